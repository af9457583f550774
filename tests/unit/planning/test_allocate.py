"""Against the best of all combinations, which small problems let us enumerate."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc.errors import BudgetError
from tdc.ir import Cost
from tdc.planning.allocate import Option, allocate, allocate_suggested, prefer_compressed, prefer_faster
from tdc.planning.budget import Budget

Problem = list[list[Option]]


@st.composite
def problems(draw: st.DrawFn, most_sites: int = 4) -> Problem:
    """Sites as propose-layouts gives them: loss falls as cost rises, the dense option comes last and loses nothing."""
    sites = []
    for _ in range(draw(st.integers(1, most_sites))):
        dense = draw(st.integers(20, 200))
        costs = sorted(draw(st.sets(st.integers(1, dense - 1), min_size=1, max_size=6)))
        losses = sorted((draw(st.floats(1e-6, 10)) for _ in costs), reverse=True)
        factor = draw(st.integers(1, 5))
        rows = [Option(Cost(c, 4 * c, c * factor), loss) for c, loss in zip(costs, losses, strict=True)]
        sites.append([*rows, Option(Cost(dense, 4 * dense, dense * factor), 0.0)])
    return sites


def total(sites: Problem, chosen: tuple[int, ...] | list[int], key: str) -> float:
    return sum(getattr(site[k].cost, key) for site, k in zip(sites, chosen, strict=True))


def loss(sites: Problem, chosen: tuple[int, ...] | list[int]) -> float:
    return sum(site[k].loss for site, k in zip(sites, chosen, strict=True))


def limits(sites: Problem, budget: Budget) -> dict[str, float]:
    dense = {key: total(sites, [len(s) - 1 for s in sites], key) for key, _ in budget.limits}
    return {key: float(Fraction(str(keep)) * Fraction(dense[key])) for key, keep in budget.limits}


def keeps(sites: Problem, chosen: tuple[int, ...] | list[int], budget: Budget) -> bool:
    return all(total(sites, chosen, key) <= limit for key, limit in limits(sites, budget).items())


def enumerated(sites: Problem, budget: Budget) -> float | None:
    """Least loss of all combinations within the budget, None if there is none."""
    every = itertools.product(*(range(len(site)) for site in sites))
    return min((loss(sites, chosen) for chosen in every if keeps(sites, chosen, budget)), default=None)


def attempt(sites: Problem, budget: Budget) -> list[int] | None:
    try:
        return allocate(sites, budget).chosen
    except BudgetError:
        return None


@given(problems(), st.floats(0.05, 1))
@settings(max_examples=150)
def test_a_budget_is_kept_or_refused_for_good_reason(sites: Problem, keep: float) -> None:
    budget = Budget((("params", keep),))
    chosen = attempt(sites, budget)
    assert (chosen is None) == (enumerated(sites, budget) is None)
    assert chosen is None or keeps(sites, chosen, budget)


@given(problems(), st.floats(0.05, 1), st.floats(0.05, 1))
@settings(max_examples=150)
def test_two_budgets_are_kept_together(sites: Problem, params: float, macs: float) -> None:
    budget = Budget((("params", params), ("macs", macs)))
    chosen = attempt(sites, budget)
    assert (chosen is None) == (enumerated(sites, budget) is None)
    assert chosen is None or keeps(sites, chosen, budget)


@given(problems(), st.floats(0.05, 1))
@settings(max_examples=150)
def test_nothing_affordable_is_left_on_the_table(sites: Problem, keep: float) -> None:
    budget = Budget((("params", keep),))
    chosen = attempt(sites, budget)
    if chosen is None:
        return
    for s, site in enumerate(sites):
        for k, option in enumerate(site):
            other = [*chosen[:s], k, *chosen[s + 1 :]]
            assert not (option.loss < site[chosen[s]].loss and keeps(sites, other, budget))


@given(problems(), st.floats(0.05, 1))
@settings(max_examples=300)
def test_one_budget_is_spent_in_the_best_way_and_the_bound_lies_below(sites: Problem, keep: float) -> None:
    budget = Budget((("params", keep),))
    best = enumerated(sites, budget)
    if best is None:
        return
    found = allocate(sites, budget)
    assert loss(sites, found.chosen) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.bound <= best * (1 + 1e-9) + 1e-12


@given(problems(), st.floats(0.05, 1), st.floats(0.05, 1))
@settings(max_examples=150)
def test_the_bound_of_two_budgets_lies_below_the_best(sites: Problem, params: float, macs: float) -> None:
    budget = Budget((("params", params), ("macs", macs)))
    best = enumerated(sites, budget)
    if best is not None:
        assert allocate(sites, budget).bound <= best * (1 + 1e-9) + 1e-12


def test_many_sites_of_many_options_are_solved_exactly_in_seconds() -> None:
    """Against the integer program's own bound: 210 sites with 60 options each, costs without a common measure."""
    import random

    draw = random.Random(3)
    sites = []
    for _ in range(210):
        dense = draw.randint(300_000, 900_000)
        costs = sorted(draw.sample(range(1000, dense), 60))
        scale = draw.lognormvariate(0, 1.5)
        rows = [Option(Cost(c, 4 * c, c), scale * (dense / c - 1) * draw.uniform(0.9, 1.1)) for c in costs]
        sites.append([*rows, Option(Cost(dense, 4 * dense, dense), 0.0)])
    budget = Budget((("params", 0.6),))
    found = allocate(sites, budget)
    assert keeps(sites, found.chosen, budget)
    assert found.bound <= loss(sites, found.chosen) <= found.bound * 1.0005


def convex_sites(count: int) -> Problem:
    """Spectra that fall like 1/r: rank r costs r, and loses the tail. All options are on the hull, steps are fine."""
    sites = []
    for s in range(count):
        weight, dense = 1.0 + s, 24
        tail = [sum(1 / k**2 for k in range(r + 1, dense)) for r in range(1, dense)]
        rows = [Option(Cost(r, 4 * r, r), weight * t) for r, t in zip(range(1, dense), tail, strict=True)]
        sites.append([*rows, Option(Cost(dense, 4 * dense, dense), 0.0)])
    return sites


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 0.5, 0.7, 0.9])
def test_falling_spectra_are_spent_within_five_percent_of_the_best(keep: float) -> None:
    sites, budget = convex_sites(3), Budget((("params", keep),))
    best = enumerated(sites, budget)
    assert best is not None
    assert best <= loss(sites, allocate(sites, budget).chosen) <= 1.05 * best


@pytest.mark.parametrize(("params", "macs"), [(0.5, 0.5), (0.3, 0.6), (0.6, 0.3)])
def test_two_quantities_are_spent_well(params: float, macs: float) -> None:
    """Sites that differ in what they cost: the first is used ten times as often as the second."""
    sites = [
        [Option(Cost(o.cost.params, o.cost.bytes, o.cost.macs * often), o.loss) for o in site]
        for site, often in zip(convex_sites(3), (10, 1, 3), strict=True)
    ]
    budget = Budget((("params", params), ("macs", macs)))
    best = enumerated(sites, budget)
    assert best is not None
    assert best <= loss(sites, allocate(sites, budget).chosen) <= 1.05 * best


@given(problems())
def test_a_budget_of_one_keeps_everything(sites: Problem) -> None:
    assert loss(sites, allocate(sites, Budget((("params", 1.0),))).chosen) == 0


@given(problems(), st.floats(0.001, 0.999))
def test_the_nearest_reachable_budget_in_the_message_is_reachable(sites: Problem, keep: float) -> None:
    budget = Budget((("params", keep), ("macs", keep)))
    try:
        allocate(sites, budget)
    except BudgetError as error:
        nearest = re.findall(r"nearest reachable one is (\S+)$", str(error))[0]
        assert attempt(sites, Budget.parse(nearest)) is not None


def test_a_precious_site_gets_more_than_a_worthless_one() -> None:
    cheap, dear = convex_sites(2)
    dear = [Option(o.cost, 100 * o.loss) for o in dear]
    chosen = allocate([cheap, dear], Budget((("params", 0.5),))).chosen
    assert chosen[1] > chosen[0]


def test_a_quantity_that_nothing_costs_does_not_bind() -> None:
    sites = [[Option(Cost(1, 4, 0.0), 1.0), Option(Cost(9, 36, 0.0), 0.0)]]
    assert allocate(sites, Budget((("params", 0.5), ("macs", 0.1)))).chosen == [0]


@given(problems(), st.floats(0.05, 1))
@settings(max_examples=150)
def test_dense_sites_are_compressed_where_that_is_as_good(sites: Problem, keep: float) -> None:
    """Never a dearer option, never above three hundredths more loss, and no other site is touched."""
    chosen = attempt(sites, Budget((("params", keep),)))
    if chosen is None:
        return
    after = prefer_compressed(sites, chosen)
    assert loss(sites, after) <= 1.03 * loss(sites, chosen) + 1e-12
    for site, old, new in zip(sites, chosen, after, strict=True):
        assert old == new or (old == len(site) - 1 and site[new].cost.params <= 0.99 * site[old].cost.params)


def test_a_lossless_option_is_taken_even_where_dense_fits() -> None:
    site = [Option(Cost(50, 200, 50), 0.0), Option(Cost(100, 400, 100), 0.0)]
    assert prefer_compressed([site], [1]) == [0]


def test_of_suggested_options_the_one_of_the_shortest_description_is_taken() -> None:
    """``1000 ln(error) + 6.9 params``: twice the error is worth a hundred numbers, and a weight lost is worth none."""
    dense = Option(Cost(1000, 4000, 1000), 0.0)

    def site(*pairs: tuple[int, float]) -> list[Option]:
        return [*(Option(Cost(params, 4 * params, params), loss) for params, loss in pairs), dense]

    sites = [site((300, 0.02), (390, 0.01)), site((300, 0.02), (410, 0.01)), site((5, 0.98), (300, 0.02)), site()]
    assert allocate_suggested(sites) == [1, 0, 1, 0]
    assert allocate_suggested([site((300, 1e-15), (310, 0.0))]) == [0], "rounding counts for nothing"


def timed(*rows: tuple[int, float, float]) -> tuple[list[Option], list[float]]:
    """Options of (params, loss), and the seconds of each."""
    return [Option(Cost(params, 0, 0.0), loss) for params, loss, _ in rows], [seconds for *_, seconds in rows]


def test_the_faster_of_two_that_are_as_good_is_taken() -> None:
    site, seconds = timed((50, 1.01, 2.0), (50, 1.0, 3.0), (100, 0.0, 4.0))
    assert prefer_faster([site], [1], ["params"], lambda s, k: seconds[k]) == [0]


@pytest.mark.parametrize(
    ("rival", "why"),
    [
        ((50, 1.04, 1.0), "it loses more than three hundredths"),
        ((51, 0.9, 1.0), "it costs more than what it would replace"),
        ((50, 1.0, 2.99), "it saves less than two hundredths of the time"),
    ],
)
def test_what_is_not_as_good_or_hardly_faster_is_not(rival: tuple[int, float, float], why: str) -> None:
    site, seconds = timed(rival, (50, 1.0, 3.0), (100, 0.0, 0.5))
    assert prefer_faster([site], [1], ["params"], lambda s, k: seconds[k]) == [1], why


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=2, max_size=6), min_size=1, max_size=5)
)
def test_preferring_speed_never_costs_more_nor_loses_more_than_the_band(sites: list[list[tuple[int, float]]]) -> None:
    options = [[Option(Cost(params, 0, 0.0), loss) for params, loss in site] for site in sites]
    before = [len(site) // 2 for site in options]
    after = prefer_faster(options, before, ["params"], lambda s, k: 1.0 + ((7 * k + 3 * s) % 5))
    old, new = (sum(site[k].loss for site, k in zip(options, chosen, strict=True)) for chosen in (before, after))
    assert new <= 1.03 * old + 1e-12
    assert all(s[k].cost.params <= s[j].cost.params for s, j, k in zip(options, before, after, strict=True))
