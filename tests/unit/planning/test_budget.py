from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc.errors import BudgetError
from tdc.ir import Cost
from tdc.planning.budget import QUANTITIES, Budget

KEEP = st.floats(0.001, 1, exclude_min=False).map(lambda x: float(f"{x:.4g}"))


@given(st.dictionaries(st.sampled_from(QUANTITIES), KEEP, min_size=1))
def test_a_mapping_a_text_and_a_print_are_one_budget(limits: dict[str, float]) -> None:
    budget = Budget.parse(limits)
    assert dict(budget.limits) == limits
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(", ".join(f" {key} = {value}" for key, value in limits.items())) == budget
    assert Budget.parse(budget) is budget


def test_an_allowance_is_a_fraction_of_the_dense_cost() -> None:
    allowed = Budget.parse("params=0.5,macs=0.25").allowance(Cost(1000, 4000, 8000.0))
    assert allowed == {"params": 500, "macs": 2000}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, r"write budget='params=0\.5'"),
        (1, r"write budget='params=1'"),
        (True, "must be a text"),
        (None, "must be a text"),
        ([0.5], "must be a text"),
        ("", "cannot read"),
        ({}, "empty"),
        ("0.5", "cannot read '0.5'"),
        ("params", "cannot read 'params'"),
        ("param=0.5", "unknown quantity 'param' in the budget; did you mean 'params'"),
        ("speed=0.5", "unknown quantity 'speed'"),
        ("params=half", "params='half' in the budget is not a number"),
        ("params=", "is not a number"),
        ("params=0", "above 0 and at most 1"),
        ("params=1.5", "above 0 and at most 1"),
        ("params=-1", "above 0 and at most 1"),
        ("params=nan", "above 0 and at most 1"),
        ("params=inf", "above 0 and at most 1"),
        ({"params": None}, "is not a number"),
        ("params=0.5,params=0.6", "names a quantity twice"),
        ("params=0.5,", "cannot read ''"),
    ],
)
def test_what_is_no_budget_is_refused(given: object, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(given)
