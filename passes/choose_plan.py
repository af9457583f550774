"""choose-plan: one candidate per site under the budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tdc.errors import BudgetError, ModelError, VerificationError
from tdc.ir import Candidate, Cost, Plan, Remark
from tdc.options import takes_budget
from tdc.planning.allocate import (
    Option,
    allocate,
    allocate_suggested,
    allocate_uniform,
    prefer_compressed,
    prefer_faster,
)
from tdc.planning.budget import Budget

from ._rivals import alone, cost_of, group_offers, loss_of, priced, rivals_of
from ._seconds import members_seconds
from .base import Members, Pass, Unit
from .propose_layouts import metric_name

__all__ = ["ChoosePlan"]

_ROUNDS = 3
_EXACT = 8
_SUGGESTED = (
    "no budget: each weight has the ranks that {} suggests, in the format of least n ln(error) + params ln(n), "
    "n the numbers in the weight"
)


@dataclass(frozen=True)
class ChoosePlan(Pass):
    """``loss = sensitivity * error`` is minimised over all sites within one budget (allocation ``lagrangian``); how far
    the choice can be above the least possible loss stands in the plan.

    Sites that came out dense are then compressed where that is as good, within the band of the prediction, and with a
    table of this machine's times each takes the fastest layout that is as good. Groups of
    sites are decided together where that loses less at the same price. With ``uniform`` every site takes its most
    accurate candidate within the same fraction of its own dense cost. With an allocation that takes no budget, whose
    candidates have the ranks that it suggests, every site takes the one of the shortest description
    (:func:`tdc.planning.allocate.allocate_suggested`).
    """

    name = "choose-plan"

    def run(self, unit: Unit) -> Unit:
        if not unit.sites:
            reasons = "; ".join(str(remark) for remark in unit.remarks[:5])
            raise ModelError(f"the model has no site that can be decomposed. {reasons}")
        rows = [unit.candidates[site.order] for site in unit.sites]
        chosen, price, bound = _chosen(unit, rows)
        offers = group_offers(unit, chosen, price)
        picked = [
            replace(c, rivals=rivals_of((*row, c), c, price, offers.get(c.site.order, ())))
            for row, c in zip(rows, chosen, strict=True)
        ]
        if unit.options.budget is None:
            unit = unit.remarking(Remark("", self.name, _SUGGESTED.format(unit.options.allocation)))
        remarks = [_kept_dense(c) for c, row in zip(picked, rows, strict=True) if c.is_dense and len(row) > 1]
        unit = unit.remarking(*remarks)
        plan = Plan(
            choices=tuple(picked),
            metric=metric_name(unit),
            statistics=unit.statistics.digest if unit.statistics is not None else "",
            target=unit.target.name,
            budget="" if unit.options.budget is None else str(Budget.parse(unit.options.budget)),
            allocation=unit.options.allocation,
            seed=unit.options.seed,
            bound=bound,
            price=tuple(price.items()),
            remarks=unit.remarks,
        )
        return unit.having(plan=plan)

    def ensures(self, before: Unit, after: Unit) -> None:
        assert after.plan is not None
        if after.options.budget is None:
            return
        spent, dense = after.plan.cost, after.plan.dense_cost
        for key, limit in Budget.parse(after.options.budget).allowance(dense).items():
            if getattr(spent, key) > limit * (1 + 1e-9):
                raise VerificationError(f"the plan spends {getattr(spent, key)} {key}; the budget allows {limit}")


def _chosen(
    unit: Unit, rows: Sequence[Sequence[Candidate]]
) -> tuple[list[Candidate], Mapping[str, float], float | None]:
    """The candidate of each row; the prices, and the bound of the loss, where they are known."""
    if takes_budget(unit.options.allocation):
        budget = Budget.parse(unit.options.budget)
        if budget.least:
            raise BudgetError(f"the budget {budget} is met by measuring plans: it is one of tdc.plan and tdc.compress")
        if budget.timed:
            budget = _in_seconds(unit, budget, rows)
        if unit.options.allocation != "uniform":
            found = _with_groups(unit, budget)
            price = {key: float(f"{value:.6g}") for key, value in found.price.items()}
            return found.chosen, price, float(f"{found.bound:.6g}")
    errors = [[Option(c.cost, c.error) for c in row] for row in rows]
    taken = allocate_uniform(errors, budget) if takes_budget(unit.options.allocation) else allocate_suggested(errors)
    return [row[k] for row, k in zip(rows, taken, strict=True)], {}, None


def _in_seconds(unit: Unit, budget: Budget, rows: Sequence[Sequence[Candidate]]) -> Budget:
    """The limit of time as one of the candidate sites: what is not of them stays as it is. Raises BudgetError with the
    nearest budget that can be reached.
    """
    assert unit.timing is not None
    seconds, part = unit.timing
    dense = sum(row[-1].cost.seconds for row in rows)
    least = sum(min(c.cost.seconds for c in row) for row in rows) / dense if dense else 1.0
    share = 1 - (1 - budget.time(seconds)) / part if part else 1.0
    if share < least:
        near = 1 - part + part * least
        raise BudgetError(
            f"the budget {budget} cannot be reached: a run takes {1e3 * seconds:.3g} ms, {part:.0%} of that in layers "
            f"that can be replaced; the nearest one is latency={math.ceil(1e4 * near) / 1e4:g}"
        )
    return budget.with_limit("seconds", min(1.0, share))


@dataclass(frozen=True)
class _Choice:
    """One candidate a site, in the order of the unit's sites; see :class:`tdc.planning.allocate.Allocation`."""

    chosen: list[Candidate]
    loss: float
    bound: float
    price: Mapping[str, float]


def _with_groups(unit: Unit, budget: Budget) -> _Choice:
    """The best allocation with some of the groups decided jointly: those that lose less so at the price of the last
    one, and none where that is no better.
    """
    joined = frozenset[int]()
    try:
        best = _allocated(unit, budget, joined)
    except BudgetError:
        if not unit.joint:
            raise
        joined = _disjoint(unit, {group: float(len(_sites_in(unit, group))) for group in unit.joint})
        best = _allocated(unit, budget, joined)
    price = best.price
    for _ in range(_ROUNDS if unit.joint and price else 0):
        wanted = _disjoint(unit, _gains(unit, price))
        if wanted == joined:
            break
        joined = wanted
        try:
            found = _allocated(unit, budget, joined)
        except BudgetError:  # together they cannot be as small as apart
            break
        price = found.price or price
        best = min(best, found, key=lambda choice: choice.loss)
    if unit.joint:
        best = replace(best, bound=_bound(unit, budget, best.price))
    return best


def _allocated(unit: Unit, budget: Budget, joined: Collection[int]) -> _Choice:
    inside = {c.site.order for group in joined for c in unit.joint[group][0]}
    seats: list[tuple[Members, ...]] = [
        tuple((c,) for c in unit.candidates[site.order]) for site in unit.sites if site.order not in inside
    ]
    for group in joined:
        dense = tuple(unit.candidates[c.site.order][-1] for c in unit.joint[group][0])
        seats.append((*unit.joint[group], dense))
    options = [[Option(cost_of(members), loss_of(members)) for members in seat] for seat in seats]
    found = allocate(options, budget)
    taken = prefer_compressed(options, found.chosen)
    if unit.target.table is not None and not budget.timed:
        quantities = [key for key, _ in budget.limits]
        taken = prefer_faster(options, taken, quantities, lambda s, k: members_seconds(unit.target, seats[s][k]))
    chosen = {c.site.order: c for seat, k in zip(seats, taken, strict=True) for c in seat[k]}
    loss = sum(seat[k].loss for seat, k in zip(options, found.chosen, strict=True))
    return _Choice([chosen[site.order] for site in unit.sites], loss, found.bound, found.price)


def _gains(unit: Unit, price: Mapping[str, float]) -> dict[int, float]:
    """What each group saves at these prices when it is decided together, where that is anything."""
    found = {group: _apart(unit, group, price) - _together(unit, group, price) for group in unit.joint}
    return {group: gain for group, gain in found.items() if gain > 0}


def _sites_in(unit: Unit, group: int) -> frozenset[int]:
    return frozenset(c.site.order for c in unit.joint[group][0])


def _disjoint(unit: Unit, gains: Mapping[int, float]) -> frozenset[int]:
    """Groups that are to be decided together; of those that have a site in common the one that gains most."""
    taken: set[int] = set()
    found = []
    for group, _ in sorted(gains.items(), key=lambda pair: -pair[1]):
        sites = _sites_in(unit, group)
        if not sites & taken:
            found.append(group)
            taken |= sites
    return frozenset(found)


def _most_gained(unit: Unit, price: Mapping[str, float]) -> float:
    """At least what groups save that have no site in common: of each set of groups that hang together by their sites
    the best choice, of large ones the sum of all.
    """
    gains, total = _gains(unit, price), 0.0
    rest = {group: _sites_in(unit, group) for group in gains}
    while rest:
        first = next(iter(rest))
        here, sites = [first], rest.pop(first)
        while near := [group for group, own in rest.items() if own & sites]:
            here += near
            sites = sites.union(*(rest.pop(group) for group in near))
        own = [(gains[group], _sites_in(unit, group)) for group in here]
        total += _apart_most(own) if len(own) <= _EXACT else sum(gain for gain, _ in own)
    return total


def _apart_most(groups: Sequence[tuple[float, frozenset[int]]]) -> float:
    """The most that a choice of groups without common sites gains."""
    if not groups:
        return 0.0
    (gain, sites), *rest = groups
    return max(_apart_most(rest), gain + _apart_most([g for g in rest if not g[1] & sites]))


def _together(unit: Unit, group: int, price: Mapping[str, float]) -> float:
    return min(priced(members, price) for members in unit.joint[group])


def _apart(unit: Unit, group: int, price: Mapping[str, float]) -> float:
    return sum(alone(unit, c.site.order, price) for c in unit.joint[group][0])


def _bound(unit: Unit, budget: Budget, price: Mapping[str, float]) -> float:
    """What no choice within the budget loses less than: at any price, each site or group takes its best one."""
    rows = [unit.candidates[site.order] for site in unit.sites]
    least = sum(alone(unit, site.order, price) for site in unit.sites) - _most_gained(unit, price)
    allowed = budget.allowance(sum((row[-1].cost for row in rows), Cost(0, 0, 0)))
    return max(0.0, least - sum(value * allowed[key] for key, value in price.items()))


def _kept_dense(candidate: Candidate) -> Remark:
    reason = (
        f"stays dense: {candidate.sensitivity:.3g} per unit of error makes every smaller layout cost more than it saves"
    )
    return Remark(candidate.site.name, "choose-plan", reason)
