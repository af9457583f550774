"""Which formats are tried, and why one is left out."""

from __future__ import annotations

import torch
from torch import nn

import tdc
from tdc import decompositions
from tdc.passes.propose_layouts import _allowed


def names(allow: tuple[str, ...]) -> set[str]:
    return {d.name for d in _allowed(allow)}


def test_all_names_every_format_and_nothing_those_that_are_tried_by_default() -> None:
    assert names(("all",)) == set(decompositions.names())
    assert names(("cp", "svd")) == {"cp", "svd"}
    assert names(()) == {name for name in decompositions.names() if decompositions.get(name).by_default}
    assert "cp" not in names(())
    assert "tucker2" in names(())


def test_all_formats_compete_in_one_plan() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64)).eval()
    x = torch.randn(8, 64)
    alone = tdc.plan(model, x, budget="params=0.5", allow="svd", progress=False)
    plan = tdc.plan(model, x, budget="params=0.5", allow="all", progress=False)
    assert sum(c.error * c.sensitivity for c in plan.choices) <= sum(c.error * c.sensitivity for c in alone.choices)
    assert plan.cost.params <= 0.5 * plan.dense_cost.params


def test_a_format_that_gains_nothing_says_so_with_the_numbers_where_it_was_named() -> None:
    small = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 10)).eval()
    plan = tdc.plan(small, torch.randn(2, 2, 8, 8), budget="params=0.9", allow=("svd", "cp"), progress=False)
    reasons = [remark.reason for remark in plan.remarks if remark.stage == "propose-layouts"]
    assert any(reason.startswith("linear 10x72: cp is left out") for reason in reasons)
    assert any("svd is left out" in reason for reason in reasons)
    quiet = tdc.plan(small, torch.randn(2, 2, 8, 8), budget="params=0.9", progress=False)
    assert not any("is left out" in remark.reason for remark in quiet.remarks)
