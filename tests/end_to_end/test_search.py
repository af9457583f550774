"""Budgets that limit the loss, or what the user's own function loses: plans are measured until one is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import BudgetError, OptionError
from tdc.planning.budget import Budget
from tdc.statistics import divergence

DATA = torch.randn(640, 32, generator=torch.Generator().manual_seed(5)) * torch.linspace(3, 0.05, 32)
TRAIN, TEST = list(DATA[:512].split(128)), DATA[512:]


def model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(6)
    made = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 12)).eval()
    with torch.no_grad():
        for layer in made:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
    return made


def moved(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return divergence({"y": dense(x)}, {"y": small(x)})


def kept(small: Any, quantity: str = "params") -> float:
    made = tdc.report(small)
    return float(getattr(made.after, quantity) / getattr(made.before, quantity))


@pytest.mark.parametrize("limit", [0.003, 0.03])
def test_the_smallest_plan_that_moves_the_outputs_by_no_more_than_the_loss(limit: float) -> None:
    dense = model()
    small = tdc.compress(dense, budget=f"loss={limit}", calibration=TRAIN, progress=False)
    lost = sum(moved(dense, small, x) for x in TRAIN) / len(TRAIN)
    assert lost <= limit * 1.001
    assert any(r.stage == "search-plan" and "plans were measured" in r.reason for r in tdc.report(small).remarks)
    tighter = tdc.compress(dense, budget=f"params={0.9 * kept(small)}", calibration=TRAIN, progress=False)
    assert sum(moved(dense, tighter, x) for x in TRAIN) / len(TRAIN) > limit


def test_a_plan_that_was_searched_is_applied_as_any_other() -> None:
    dense = model()
    statistics = tdc.calibrate(dense, TRAIN, progress=False)
    plan = tdc.plan(dense, TRAIN[0], budget="loss=0.02", statistics=statistics, probe=[TEST], progress=False)
    assert plan.budget == "loss=0.02"
    small = tdc.compress(dense, TRAIN[0], plan=plan, statistics=statistics, progress=False)
    assert moved(dense, small, TEST) <= 0.0201


def test_another_quantity_is_made_as_small_as_it_can_be() -> None:
    dense = model()
    plan = tdc.plan(dense, budget="loss=0.02,macs=min", calibration=TRAIN, progress=False)
    assert plan.budget == "loss=0.02,macs=min"
    assert plan.cost.macs < plan.dense_cost.macs


def test_no_more_is_lost_than_the_users_function_may_lose() -> None:
    dense, seen = model(), []
    with torch.no_grad():
        labels = dense(TEST).argmax(-1)

    @torch.no_grad()
    def accuracy(candidate: nn.Module) -> float:
        seen.append(candidate)
        return 100 * float((candidate(TEST).argmax(-1) == labels).float().mean())

    small = tdc.compress(dense, calibration=TRAIN, evaluate=accuracy, metric_drop=12.0, progress=False)
    assert seen[0] is dense
    assert len(seen) <= 9
    assert accuracy(small) >= 88
    assert kept(small) < 0.9


def test_onnx_files_are_evaluated_by_their_paths(tmp_path: Path) -> None:
    dense, source = model(), tmp_path / "dense.onnx"
    torch.onnx.export(dense, (TEST[:4],), source, dynamo=True, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    paths: list[Path] = []

    def nearness(path: Path) -> float:
        paths.append(path)
        session = onnxruntime.InferenceSession(path)
        found = session.run(None, {session.get_inputs()[0].name: TEST.numpy()})[0]
        return -float(np.abs(found - dense(TEST).detach().numpy()).max())

    calibration = [{onnxruntime.InferenceSession(source).get_inputs()[0].name: x.numpy()} for x in TRAIN]
    out = tmp_path / "small.onnx"
    tdc.compress_onnx(source, out, calibration=calibration, evaluate=nearness, metric_drop=0.3, progress=False)
    assert paths[0] == source
    assert nearness(out) >= -0.3 - 1e-5
    assert all(path.is_file() and path.name.startswith(("dense.onnx", "small")) for path in tmp_path.iterdir())


def test_an_exported_program_is_searched_for_too() -> None:
    dense = model()
    exported = torch.export.export(dense, (TRAIN[0],))
    small = tdc.compress_export(exported, budget="loss=0.02", calibration=TRAIN, progress=False)
    with torch.no_grad():
        lost = [divergence({"y": dense(x)}, {"y": small.module()(x)}) for x in TRAIN]
    assert sum(lost) / len(lost) <= 0.0201


def test_a_compiled_model_keeps_to_the_loss() -> None:
    dense = model()
    options = {"budget": "loss=0.02", "calibration": TRAIN, "inner": "eager"}
    compiled = torch.compile(dense, backend="tdc", options=options)
    with torch.no_grad():
        lost = [divergence({"y": dense(x)}, {"y": compiled(x)}) for x in TRAIN]
    assert 0 < sum(lost) / len(lost) <= 0.0201


def test_what_nothing_smaller_meets_is_refused_with_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"nothing smaller than dense .* params=0\.\d+ loses"):
        tdc.compress(model(), budget="loss=1e-12", calibration=TRAIN, progress=False)


def _one(candidate: nn.Module) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "loss=0.01,params=0.5"}, "limits what stays and the loss"),
        ({"budget": "loss=0"}, "above 0"),
        ({"budget": "loss=some"}, "not a number"),
        ({"budget": "params=min,macs=min"}, "limits what stays and the loss"),
    ],
)
def test_budgets_that_cannot_be_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        tdc.compress(model(), calibration=TRAIN, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "params=min"}, "needs a limit"),
        ({"evaluate": _one}, "belong together"),
        ({"metric_drop": 1.0}, "belong together"),
        ({"evaluate": _one, "metric_drop": -1}, "above 0"),
        ({"evaluate": _one, "metric_drop": 1.0, "budget": "params=0.5"}, "two limits"),
        ({"evaluate": _one, "metric_drop": 1.0, "inplace": True}, "inplace"),
        ({"evaluate": lambda _: "good", "metric_drop": 1.0}, "must return a number"),
        ({"evaluate": lambda _: float("nan"), "metric_drop": 1.0}, "returned nan"),
    ],
)
def test_goals_that_cannot_be_followed(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tdc.compress(model(), calibration=TRAIN, progress=False, **options)


def test_a_loss_needs_data_to_be_measured_on() -> None:
    statistics = tdc.calibrate(model(), TRAIN, progress=False)
    with pytest.raises(OptionError, match="is measured: give calibration="):
        tdc.compress(model(), TRAIN[0], budget="loss=0.01", statistics=statistics, progress=False)


def test_fronts_are_of_fractions() -> None:
    with pytest.raises(BudgetError, match="met by measuring"):
        tdc.pareto(model(), budgets=["loss=0.01"], calibration=TRAIN, progress=False)


@pytest.mark.parametrize("text", ["loss=0.01", "loss=0.01,macs=min", "bytes=min", "params=0.5,macs=0.6"])
def test_budgets_are_written_as_they_are_read(text: str) -> None:
    assert str(Budget.parse(text)) == text
