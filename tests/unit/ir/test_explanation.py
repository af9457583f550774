"""Plans say what was considered for each site, and why the winner won."""

from __future__ import annotations

import pytest
import torch

import tdc
from tdc.errors import PlanError
from tdc.ir import Plan
from tdc.testing import random_mlp

DATA = [torch.randn(200, 24, generator=torch.Generator().manual_seed(8))]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tdc.plan(random_mlp((24, 32, 16)), budget="params=0.5", calibration=DATA, allow=None, progress=False)


def test_every_format_that_was_tried_is_named_with_its_best_layout_and_the_winner_is_marked(plan: Plan) -> None:
    for choice in plan.choices:
        names = [rival.decomposition for rival in choice.rivals]
        assert {"dense", "svd", "pivoted"} <= set(names)
        assert choice.decomposition in names
        text = plan.explain(choice.site.name)
        (winner,) = [line for line in text.splitlines() if line.startswith("* ")]
        assert choice.decomposition in winner
        assert text.count("\n") >= len(names) + 2


def test_the_winner_has_the_least_loss_and_price_but_for_the_rest_of_the_budget(plan: Plan) -> None:
    won = 0
    for choice in plan.choices:
        ranks = (*choice.kept.items(), *choice.ranks)
        own = next(
            r
            for r in choice.rivals
            if (r.decomposition, r.ranks, r.group) == (choice.decomposition, ranks, choice.group)
        )
        won += own.priced <= choice.rivals[0].priced * 1.0001
        assert [r.priced for r in choice.rivals] == sorted(r.priced for r in choice.rivals)
    assert won >= len(plan.choices) - 1
    ((quantity, price),) = plan.price
    assert quantity == "params"
    assert price > 0


def test_what_a_group_would_take_stands_beside_what_its_sites_would_take_by_themselves(plan: Plan) -> None:
    first, second = plan.choices
    offers = [next(r for r in choice.rivals if r.group) for choice in plan.choices]
    assert [offer.group for offer in offers] == [offers[0].group] * 2
    assert [dict(offer.ranks).keys() for offer in offers] == [{"o"}, {"i"}]
    assert "(group " in plan.explain()
    assert plan.explain().count("\n* ") == 2
    for choice, offer, other in ((first, offers[0], second), (second, offers[1], first)):
        alone = min(r.priced for r in other.rivals if not r.group)
        price = dict(plan.price)["params"]
        if not choice.group:  # decided by themselves, since that takes less
            assert choice.rivals[0].priced <= offer.priced * 1.0001
        else:
            together = sum(c.sensitivity * c.error + price * c.cost.params for c in plan.choices)
            assert offer.priced == pytest.approx(together - alone, rel=1e-4)


def test_the_explanation_survives_the_file_and_the_names_are_checked(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.explain() == plan.explain()
    assert again.to_json() == plan.to_json()
    with pytest.raises(PlanError, match="no site nothing"):
        plan.explain("nothing")


def test_what_cannot_be_an_explanation_is_refused(plan: Plan) -> None:
    broken = plan.to_json().replace('"priced": ', '"priced": "much", "was": ', 1)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_json(broken)
