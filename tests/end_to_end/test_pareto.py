"""Plans for several budgets from one proposal."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tdc
from tdc.__main__ import main
from tdc.errors import BudgetError
from tdc.testing import random_mlp

X = torch.randn(128, 24)


def test_each_plan_is_the_one_for_its_budget_alone() -> None:
    model = random_mlp((24, 40, 32, 16))
    known = tdc.calibrate(model, [X], progress=False)
    front = tdc.pareto(model, (X,), budgets=("params=0.4", "macs=0.8", "params=0.7"), statistics=known, progress=False)
    for plan in front:
        alone = tdc.plan(model, (X,), budget=plan.budget, statistics=known, progress=False)
        assert plan == alone
        assert plan.to_json() == alone.to_json()
    assert [plan.cost.params for plan in front] == sorted((p.cost.params for p in front), reverse=True)
    small = tdc.compress(model, (X,), plan=front[-1], statistics=known, progress=False)
    assert tdc.report(small).after == front[-1].cost


def test_by_default_the_predicted_loss_rises_as_less_is_kept() -> None:
    front = tdc.pareto(random_mlp((24, 40, 32, 16)), calibration=[X], progress=False)
    kept = [plan.cost.params / plan.dense_cost.params for plan in front]
    assert len(front) >= 6
    assert all(later < earlier for earlier, later in pairwise(kept))
    assert all(earlier.loss < later.loss for earlier, later in pairwise(front))
    assert all(plan.bound is not None and plan.bound <= plan.loss * (1 + 1e-6) for plan in front)
    assert len(str(front).splitlines()) == 2 + len(front) + len(front.remarks)


def test_budgets_out_of_reach_are_left_out_with_a_remark_and_refused_where_none_is_left() -> None:
    model = random_mlp()
    front = tdc.pareto(model, (X,), budgets=("params=0.5", "params=0.001"), progress=False)
    assert [plan.budget for plan in front] == ["params=0.5"]
    assert "params=0.001 cannot be reached" in front.remarks[0].reason
    with pytest.raises(BudgetError, match=r"params=0\.001 cannot be reached"):
        tdc.pareto(model, (X,), budgets="params=0.001", progress=False)
    with pytest.raises(BudgetError, match="budgets is empty"):
        tdc.pareto(model, (X,), budgets=(), progress=False)
    with pytest.raises(BudgetError, match="unknown quantity"):
        tdc.pareto(model, (X,), budgets=("parms=0.5",), progress=False)


def test_the_command_prints_the_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    torch.onnx.export(random_mlp(), (X,), path, verbose=False)
    assert main(["plan", str(path), "--pareto", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("budget")
    assert any(line.startswith("params=0.5") for line in lines)
    assert main(["plan", str(path), "--pareto", "-o", str(tmp_path / "plan.json"), "--quiet"]) == 2
    assert "give --budget for the one to write" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
