from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tdc
from tdc.errors import ModelError, PlanError, TdcError
from tdc.report import Report
from tdc.testing import applicable, random_mlp

X = torch.zeros(4, 24)


def small_model(**options: Any) -> nn.Sequential:
    return tdc.compress(random_mlp(), X, **{"budget": "params=0.6", "progress": False, **options})


@pytest.mark.parametrize("name", applicable({"o": 40, "i": 24}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_model_is_the_same_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    small = small_model(allow=name).to(dtype)
    tdc.save(small, tmp_path / "m.tdc")
    again = tdc.load(tmp_path / "m.tdc", random_mlp(seed=4))
    x = torch.randn(5, 24).to(dtype)
    assert torch.equal(again(x), small(x))
    assert list(again.state_dict()) == list(small.state_dict())
    assert str(tdc.report(tmp_path / "m.tdc")) == str(tdc.report(again)) == str(tdc.report(small))


def test_the_given_architecture_is_not_changed_and_may_have_no_memory(tmp_path: Path) -> None:
    small, x = small_model(), torch.randn(5, 24)
    tdc.save(small, tmp_path / "m.tdc")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16))
    again = tdc.load(tmp_path / "m.tdc", empty)
    assert torch.equal(again(x), small(x))
    assert type(empty[0]) is nn.Linear
    assert empty[0].weight.is_meta


def test_a_loaded_model_can_be_trained_densified_and_saved(tmp_path: Path) -> None:
    tdc.save(small_model(), tmp_path / "m.tdc")
    again = tdc.load(tmp_path / "m.tdc", random_mlp())
    again(torch.randn(4, 24)).square().sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert type(tdc.densify(again)[0]) is nn.Linear
    tdc.save(again, tmp_path / "n.tdc")
    assert (tmp_path / "n.tdc").read_bytes() == (tmp_path / "m.tdc").read_bytes()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (nn.Sequential(nn.ReLU()), "0"),
        (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), "0 is a ReLU"),
        (random_mlp((24, 48, 16)), r"0|size|shape"),
        (random_mlp((24, 40, 16, 8)), "4.weight"),
    ],
    ids=["too-short", "other-modules", "other-width", "too-long"],
)
def test_another_architecture_is_refused_with_the_place(tmp_path: Path, architecture: nn.Module, message: str) -> None:
    tdc.save(small_model(), tmp_path / "m.tdc")
    with pytest.raises(PlanError, match=message):
        tdc.load(tmp_path / "m.tdc", architecture)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Path:
    tdc.save(small_model(), path)
    with safe_open(str(path), framework="pt") as file:
        head = json.loads(file.metadata()["tdc"])
    tensors = load_file(path)
    change(head, tensors)
    save_file(tensors, path, metadata={"tdc": json.dumps(head)})
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda head, tensors: head.update(format="x"),
        lambda head, tensors: head.update(version=2),
        lambda head, tensors: head.pop("plan"),
        lambda head, tensors: head.pop("report"),
        lambda head, tensors: head.update(plan="{}"),
        lambda head, tensors: head.update(report="[]"),
        lambda head, tensors: head.update(report="3"),
        lambda head, tensors: (tensors.pop("0.bias"), head.update(aliases={"0.bias": "nothing"})),
        lambda head, tensors: head.update(aliases={"0.bias": [3]}),
        lambda head, tensors: head.update(aliases=[3]),
        lambda head, tensors: tensors.pop("0.bias"),
        lambda head, tensors: tensors.update({"0.bias": torch.zeros(3)}),
        lambda head, tensors: tensors.update({"extra": torch.zeros(3)}),
        lambda head, tensors: tensors.pop(next(key for key in tensors if key.startswith("0.weight_"))),
    ],
    ids=(
        "format version no-plan no-report plan report report-3 lost-alias alias aliases no-bias bias extra no-factor"
    ).split(),
)
def test_a_tampered_file_is_refused_by_a_typed_error(tmp_path: Path, change: Callable[..., object]) -> None:
    path = rewritten(tmp_path / "m.tdc", change)
    with pytest.raises(TdcError):
        tdc.load(path, random_mlp())


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"\xff" * 8, None])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.tdc").write_bytes(content)
    for read in (lambda: tdc.load(tmp_path / "m.tdc", random_mlp()), lambda: tdc.report(tmp_path / "m.tdc")):
        with pytest.raises(ModelError, match=r"m\.tdc"):
            read()


@pytest.mark.parametrize("config", [None, "{", "{}", '{"tdc": 3}'])
def test_a_folder_that_holds_no_tdc_model_is_refused(tmp_path: Path, config: str | None) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError):
        tdc.load(tmp_path, random_mlp())


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tdc": {"plan": "", "report": ""}}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ModelError, match="outside its folder"):
        tdc.load(tmp_path, random_mlp())


def test_writing_and_reading_a_report_is_the_identity() -> None:
    report = tdc.report(small_model(exclude="2"))
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"format": "tdc-report", "version": 1}', "[" * 100_000])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="report"):
        Report.from_json(text)


def test_the_text_of_a_report(golden: Callable[[str], None]) -> None:
    """Weights of singular values 1, 1/2, 1/3, ...: the errors are exact to many more digits than are printed."""
    golden(str(tdc.report(tdc.compress(random_mlp((24, 40, 16, 1)), X, budget="params=0.5", progress=False))))
