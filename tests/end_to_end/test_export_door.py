"""``tdc.compress_export``: an exported program in, one out, that everything after export accepts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import tdc
from tdc.testing import random_mlp

X = torch.linspace(-1, 1, 6 * 24).reshape(6, 24).sin()


class Net(nn.Module):
    """Two inputs, one by keyword, a tied weight, and an output with names."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = random_mlp(), nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x) * scale
        return {"hidden": hidden, "logits": self.b(self.a(hidden).relu())}


def exported(model: nn.Module | None = None) -> tuple[nn.Module, ExportedProgram]:
    model = (model or Net()).eval()
    sizes = {"x": {0: Dim("batch", min=2, max=64)}, "scale": None}
    return model, torch.export.export(model, (X,), {"scale": torch.ones(1)}, dynamic_shapes=sizes)


def test_the_result_is_that_of_the_module_door_and_keeps_inputs_outputs_and_ranges() -> None:
    model, program = exported()
    batch = {"x": X, "scale": torch.ones(1)}
    before = set(program.state_dict)
    small = tdc.compress_export(program, budget="params=0.6", calibration=[batch], progress=False)
    expected = tdc.compress(model, batch, budget="params=0.6", calibration=[batch], progress=False)
    for rows in (6, 2, 33):
        x, scale = torch.randn(rows, 24), torch.full((1,), 2.0)
        found = small.module()(x, scale=scale)
        assert set(found) == {"hidden", "logits"}
        for name, value in expected(x, scale=scale).items():
            assert torch.allclose(found[name], value, atol=1e-5)
    assert [(int(r.lower), int(r.upper)) for r in small.range_constraints.values()] == [(2, 64)]
    with pytest.raises(Exception, match=r"(?i)batch|size|guard"):
        small.module()(torch.randn(65, 24), scale=torch.ones(1))
    assert set(program.state_dict) == before
    assert tdc.report(small).replaced == tdc.report(expected).replaced >= 2
    names = {name.rpartition(".")[0] for name in small.state_dict}
    assert names <= {"body.0", "body.2", "a", "b"}
    assert sum(t.numel() for t in small.state_dict.values() if t.is_floating_point()) < sum(
        p.numel() for p in model.parameters()
    )


def test_it_is_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    _, program = exported()
    small = tdc.compress_export(program, budget="params=0.6", progress=False)
    torch.export.save(small, tmp_path / "small.pt2")
    torch.save((X, small.module()(X, scale=torch.ones(1))["logits"].detach()), tmp_path / "pair.pt")
    code = """
import sys, torch
small = torch.export.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
print("tdc" in sys.modules, bool(torch.equal(small.module()(x, scale=torch.ones(1))["logits"], y)))
"""
    paths = [str(tmp_path / "small.pt2"), str(tmp_path / "pair.pt")]
    run = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split() == ["False", "True"], run.stderr
    again = tdc.compress_export(torch.export.load(paths[0]), budget="params=0.95", progress=False)
    assert set(again.module()(X, scale=torch.ones(1))) == {"hidden", "logits"}


def test_it_is_exported_to_onnx(tmp_path: Path) -> None:
    import onnxruntime

    model = random_mlp().eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: Dim.DYNAMIC},))
    small = tdc.compress_export(program, budget="params=0.6", progress=False)
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, dynamo=True, verbose=False).save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(9, 24)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), small.module()(x), atol=1e-5)
    assert sum(node.op_type in ("MatMul", "Gemm") for node in __import__("onnx").load(path).graph.node) >= 4


@pytest.mark.slow
def test_it_is_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = random_mlp().eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: Dim.DYNAMIC},))
    small = tdc.compress_export(program, budget="params=0.6", progress=False)
    path = str(tmp_path / "small.pt2")
    torch._inductor.aoti_compile_and_package(small, package_path=path)
    x = torch.randn(9, 24)
    assert torch.allclose(torch._inductor.aoti_load_package(path)(x), small.module()(x), atol=1e-5)


class Unusual(nn.Module):
    """Weights that act through a transposition and a plain product, and a state that the graph writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(16, 40))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return (x @ self.w) @ self.v.T + self.calls


def test_products_with_parameters_are_sites_and_the_state_is_left_alone() -> None:
    model = Unusual().eval()
    program = torch.export.export(model, (X,))
    small = tdc.compress_export(program, budget="params=0.9", calibration=[X, X], progress=False)
    assert [site.name for site in tdc.report(small).sites] == ["w", "v"]
    assert float(program.state_dict["calls"]) == float(small.state_dict["calls"]) == 0
    module = small.module()
    assert torch.allclose(module(X) + 1, module(X), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, tdc.OptionError, "give budget="),
        ({"budget": "params=0.5", "calibration": [{"y": X}]}, tdc.CalibrationError, "the batch lacks"),
        ({"budget": "params=0.5", "calibration": [3]}, tdc.CalibrationError, "batch"),
        ({"budget": "params=0.001"}, tdc.BudgetError, "reach"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    _, program = exported()
    with pytest.raises(error, match=message):
        tdc.compress_export(program, progress=False, **options)


def test_a_module_is_refused() -> None:
    with pytest.raises(tdc.ModelError, match=r"takes a torch\.export\.ExportedProgram; got Sequential"):
        tdc.compress_export(random_mlp(), budget="params=0.5")  # type: ignore[arg-type]
