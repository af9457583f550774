"""What every test gets: fixed seeds, no network, golden files, and the command-line option ``--update-golden``."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# One thread: the tensors of the tests are small, and threads that wait for each other on a busy machine take a hundred
# times as long. Before anything imports numpy or torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import difflib
import random
import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LINES = 40

hypothesis.settings.register_profile("tdc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tdc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files instead of comparing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for a test, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """No times that somebody measured on this machine."""
    monkeypatch.setattr("tdc.targets._table.folder", lambda: Path("/nonexistent/tdc/targets"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``golden(text)`` compares with ``tests/golden/<test file>/<test name>.txt``; one call a test."""
    name = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")
    path = GOLDEN / request.node.path.stem / f"{name}.txt"

    def compare(text: str) -> None:
        text = text.rstrip("\n") + "\n"
        lines = text.count("\n")
        assert lines <= GOLDEN_LINES, f"a golden file has at most {GOLDEN_LINES} lines, this text has {lines}:\n{text}"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        advice = f"if this is right: pytest --update-golden '{request.node.nodeid}', and read the change in {path}"
        if not path.is_file():
            pytest.fail(f"no golden file for this text:\n{text}\n{advice}", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="")
            pytest.fail("\n".join(diff) + f"\n{advice}", pytrace=False)

    return compare
