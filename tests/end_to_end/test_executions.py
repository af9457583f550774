"""The three ways to run a plan: factors one after the other, the weight built once, or at every call; in every door."""

from __future__ import annotations

import copy
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.ir import Plan, Rebuild
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
X = torch.linspace(-2, 2, 3 * 3 * 8 * 8).sin().reshape(3, 3, 8, 8)


class Net(nn.Module):
    """A strided convolution with padding, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(256, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


def planned(model: nn.Module | Path, execution: str) -> Plan:
    example = X if isinstance(model, nn.Module) else None
    plan = tdc.plan(model, example, budget="params=1.0", progress=False)
    formats = (("output_svd", 6), ("svd", 8))
    choices = tuple(
        replace(choice, decomposition=name, variant="", ranks=(("r", rank),), execution=execution)
        for choice, (name, rank) in zip(plan.choices, formats, strict=True)
    )
    return replace(plan, choices=choices)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executions") / "dense.onnx"
    torch.onnx.export(Net().eval(), (X,), path, dynamo=True, input_names=["x"], external_data=False)
    return path


def expected() -> Tensor:
    model = Net().eval()
    small = tdc.compress(model, X, plan=planned(model, "factored"), progress=False)
    with torch.no_grad():
        assert float((small(X) - model(X)).abs().max()) > 1e-3
        return small(X)


@pytest.mark.parametrize("execution", ["stored", "rebuilt"])
def test_modules(execution: str) -> None:
    model = Net().eval()
    small = tdc.compress(model, X, plan=planned(model, execution), progress=False)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(small(X), expected(), atol=1e-5)
        state = small.state_dict()
        assert sum(t.numel() for t in state.values()) < 0.6 * sum(p.numel() for p in model.parameters())
        small.head.weight_v.mul_(2)
        assert not torch.allclose(small(X), expected(), atol=1e-2)
        small.head.weight_v.div_(2)
    again = copy.deepcopy(small)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    with torch.no_grad():
        assert torch.allclose(again(X), expected(), atol=1e-5)
    small(X).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in small.parameters())


def test_a_stored_weight_is_built_once_and_a_rebuilt_one_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = sys.modules["tdc.frontends.nn.factored"]
    calls: list[str] = []
    build = factored.built

    def counted(shape: Rebuild, *args: Any) -> Tensor:
        calls.append(str(shape))
        return build(shape, *args)

    monkeypatch.setattr(factored, "built", counted)
    model = Net().eval()
    for execution, times in (("stored", 0), ("rebuilt", 6)):
        small = tdc.compress(model, X, plan=planned(model, execution), progress=False)
        with torch.no_grad():
            small(X)
            calls.clear()
            for _ in range(3):
                small(X)
        assert len(calls) == times


@pytest.mark.parametrize("execution", ["stored", "rebuilt"])
def test_onnx_files(execution: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    tdc.compress_onnx(exported, path, plan=planned(exported, execution), progress=False)
    answer = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": X.numpy()})[0]
    assert np.abs(answer - expected().numpy()).max() < 1e-5
    assert path.stat().st_size < 0.8 * exported.stat().st_size
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Conv") == 1
    assert "Einsum" in kinds


@pytest.mark.parametrize("execution", ["stored", "rebuilt"])
def test_compiled_graphs(execution: str) -> None:
    model = Net().eval()
    options: dict[str, Any] = {"plan": planned(model, execution), "inner": "eager", "strict": True}
    fast = torch.compile(model, backend=tdc_backend, options=options)
    with torch.no_grad():
        assert torch.allclose(fast(X), expected(), atol=1e-5)


def test_a_plan_file_keeps_the_execution_and_refuses_others() -> None:
    plan = planned(Net().eval(), "stored")
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text) != planned(Net().eval(), "factored")
    assert "output_svd (stored)" in str(plan)
    with pytest.raises(tdc.PlanError, match="'twice' is none of factored, stored, rebuilt"):
        Plan.from_json(text.replace('"execution": "stored"', '"execution": "twice"'))


def test_costs_are_those_of_the_execution() -> None:
    model = Net().eval()
    costs = {}
    for execution in ("factored", "stored", "rebuilt"):
        small = tdc.compress(model, X, plan=planned(model, execution), progress=False)
        costs[execution] = tdc.report(small)
    dense = costs["stored"].before.macs
    assert costs["factored"].after.macs < dense
    assert math.isclose(costs["stored"].after.macs, dense, rel_tol=0.2)
    assert costs["stored"].after.params == costs["factored"].after.params < costs["stored"].before.params
