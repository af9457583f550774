"""The same input, options and seed give the same bytes; a saved model computes the same bits in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tdc
from tdc.testing import applicable, random_mlp

WRITE = """
import sys, torch, tdc
from tdc.testing import random_mlp
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(1)
batches = [torch.randn(64, 24, generator=generator) for _ in range(2)]
known = tdc.calibrate(random_mlp(), batches, progress=False)
known.save(sys.argv[1] + ".stats")
small = tdc.compress(random_mlp(), batches[0], budget="params=0.6", statistics=known, progress=False)
tdc.save(small, sys.argv[1] + ".tdc")
"""

READ = """
import sys, torch, tdc
from tdc.testing import random_mlp
torch.set_num_threads(1)
model = tdc.load(sys.argv[1], random_mlp(seed=9))
x = torch.load(sys.argv[2], weights_only=True)
torch.save(model(x).detach(), sys.argv[3])
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_elsewhere(code: str, *arguments: Path) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=arguments[0].parent, check=False)
    assert run.returncode == 0, run.stderr


def write_here(stem: Path) -> nn.Module:
    names: dict[str, object] = {}
    code = WRITE.replace("sys.argv[1]", repr(str(stem)))
    exec(compile(code, "write", "exec"), names)
    small = names["small"]
    assert isinstance(small, nn.Module)
    return small


def digests(stem: Path) -> dict[str, str]:
    return {s: hashlib.sha256(stem.with_suffix(s).read_bytes()).hexdigest() for s in (".stats", ".tdc")}


def test_the_same_call_gives_the_same_bytes_here_and_in_another_process(tmp_path: Path) -> None:
    write_here(tmp_path / "first")
    write_here(tmp_path / "second")
    run_elsewhere(WRITE, tmp_path / "third")
    assert digests(tmp_path / "first") == digests(tmp_path / "second") == digests(tmp_path / "third")


@pytest.mark.parametrize("name", applicable({"o": 40, "i": 24}))
def test_the_same_seed_gives_the_same_plan_and_factors(name: str) -> None:
    x = torch.randn(64, 24)
    plans, states = [], []
    for _ in range(2):
        options = {"budget": "params=0.6", "calibration": [x], "allow": name, "seed": 3, "progress": False}
        plans.append(tdc.plan(random_mlp(), x, **options).to_json())
        states.append(tdc.compress(random_mlp(), x, **options).state_dict())
    assert plans[0] == plans[1]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    x, models = torch.randn(64, 24), [random_mlp(), random_mlp()]
    made = []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        made.append(tdc.compress(model, x, budget="params=0.6", calibration=[x], progress=False))
        assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))


@pytest.mark.parametrize("name", applicable({"o": 40, "i": 24}))
def test_a_saved_model_computes_the_same_bits_in_a_new_process(tmp_path: Path, name: str) -> None:
    x = torch.randn(5, 24)
    small = tdc.compress(random_mlp(), x, budget="params=0.6", allow=name, progress=False)
    tdc.save(small, tmp_path / "model.tdc")
    torch.save(x, tmp_path / "x.pt")
    run_elsewhere(READ, tmp_path / "model.tdc", tmp_path / "x.pt", tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), small(x))


def test_saving_what_was_loaded_gives_the_same_file(tmp_path: Path) -> None:
    small = write_here(tmp_path / "first")
    again = tdc.load(tmp_path / "first.tdc", random_mlp(seed=9))
    tdc.save(again, tmp_path / "again.tdc")
    assert (tmp_path / "again.tdc").read_bytes() == (tmp_path / "first.tdc").read_bytes()
    assert str(tdc.report(again)) == str(tdc.report(small))
