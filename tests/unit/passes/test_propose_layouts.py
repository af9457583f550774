"""Which formats are tried, and why one is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdc
from tdc import decompositions
from tdc.passes.propose_layouts import allowed


def names(allow: tuple[str, ...]) -> set[str]:
    return {d.name for d in allowed(allow)}


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


def test_what_is_too_large_is_declined_before_its_errors_are_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    d = decompositions.get("svd")
    monkeypatch.setattr(type(d), "too_large", lambda self, axes, variant: f"{axes['o']} rows take 9 GB")
    monkeypatch.setattr(type(d), "errors", lambda self, *args: pytest.fail("the errors are worked out"))
    plan = tdc.plan(
        nn.Sequential(nn.Linear(64, 48)), torch.randn(8, 64), budget="params=1", allow="svd", progress=False
    )
    assert any("svd is left out: 48 rows take 9 GB" in remark.reason for remark in plan.remarks)


def test_four_modes_of_a_large_matrix_are_declined_with_the_numbers() -> None:
    d = decompositions.get("tt_matrix")
    assert "2.2 GB" in d.too_large({"o": 4096, "i": 4096}, "4")
    assert d.too_large({"o": 2048, "i": 2048}, "4") == d.too_large({"o": 4096, "i": 4096}, "3") == ""
