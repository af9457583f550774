"""Spending one budget over all sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import BudgetError
from ..ir import Cost
from .budget import Budget
from .knapsack import multiple_choice

__all__ = [
    "Allocation",
    "Option",
    "allocate",
    "allocate_suggested",
    "allocate_uniform",
    "prefer_compressed",
    "prefer_faster",
]

_BISECTIONS = 200
_ROUNDS = 60
_BAND = 0.03
"""Differences of predicted loss below this fraction say nothing."""
_LEAST_SAVING = 0.01
_FASTER = 0.98
_ROUNDING = 1e-12
"""Relative squared errors below this are rounding."""


@dataclass(frozen=True)
class Option:
    """One way to treat a site: what it costs and the loss (change of the model's output) it is predicted to cause."""

    cost: Cost
    loss: float


@dataclass(frozen=True)
class Allocation:
    """``chosen``: for every site the index of its option. ``bound``: no choice within the budget has less loss.
    ``price``: the loss that one more unit of each quantity of the budget saves, about; at these prices each site takes
    the option of least ``loss + price cost``, but for what it takes to spend the budget to its end.
    """

    chosen: list[int]
    bound: float
    price: Mapping[str, float] = field(default_factory=dict)


def allocate(options: Sequence[Sequence[Option]], budget: Budget) -> Allocation:
    """For every site the index of the option to take: least total loss within the budget.

    ``minimise sum_s loss_s(k_s)  subject to  sum_s cost_s(k_s) <= keep * dense`` for every quantity of the budget.
    The last option of each site must be the dense one. By Lagrangian relaxation: for a price on the (normalised) cost
    each site takes the option of least ``loss + price * cost``, which reaches the vertices of the lower convex hull
    of its options; the price is bisected, and the budget left over is then spent on the steps of greatest loss saved
    per cost (Everett 1963; Shoham and Gersho 1988). With several quantities the weights of the price move towards the
    one that is exceeded most; with one, the choice is made the best one (:mod:`.knapsack`).

    Raises BudgetError with the nearest reachable budget if even the cheapest options exceed it.
    """
    dense = sum((site[-1].cost for site in options), Cost(0, 0, 0))
    allowed = {key: limit for key, limit in budget.allowance(dense).items() if getattr(dense, key) > 0}
    _check_reachable(options, budget, dense)
    weights = {key: 1.0 / len(allowed) for key in allowed}
    best: list[int] | None = None
    price: dict[str, float] = {}
    bound, multiplier = 0.0, 0.0
    for _ in range(_ROUNDS if len(allowed) > 1 else 1):
        chosen, multiplier, below = _least_price(options, _price_of(allowed, weights))
        bound = max(bound, below)
        over = {key: _total(options, chosen, key) / limit for key, limit in allowed.items()}
        if max(over.values()) <= 1 and (best is None or _loss(options, chosen) < _loss(options, best)):
            best = chosen
            price = {key: multiplier * weights[key] / limit for key, limit in allowed.items()}
        weights = {key: weights[key] * over[key] ** 2 for key in allowed}
        scale = sum(weights.values())
        weights = {key: weight / scale for key, weight in weights.items()}
    if best is None:
        best = _cheapest(options, allowed)
    chosen = _fill(options, best, allowed)
    if len(allowed) == 1:
        (key, limit), *_ = allowed.items()
        rows = [[getattr(option.cost, key) for option in site] for site in options]
        losses = [[option.loss for option in site] for site in options]
        chosen, below = multiple_choice(rows, losses, limit, multiplier / limit, chosen)
        bound = max(bound, below)
    return Allocation(chosen, bound, price)


def _price_of(allowed: Mapping[str, float], weights: Mapping[str, float]) -> Callable[[Cost], float]:
    def price(cost: Cost) -> float:
        return sum(weights[key] * getattr(cost, key) / limit for key, limit in allowed.items())

    return price


def _least_price(options: Sequence[Sequence[Option]], price: Callable[[Cost], float]) -> tuple[list[int], float, float]:
    """The hull solution: the smallest multiplier whose choice costs at most 1 in the normalised price; that multiplier,
    and the Lagrangian bound of the loss that it gives.
    """
    priced = [[price(option.cost) for option in site] for site in options]

    def choose(multiplier: float) -> tuple[list[int], float]:
        chosen = [
            min(range(len(site)), key=lambda k: (site[k].loss + multiplier * row[k], row[k]))
            for site, row in zip(options, priced, strict=True)
        ]
        return chosen, sum(row[k] for row, k in zip(priced, chosen, strict=True))

    def bound(multiplier: float, chosen: list[int], total: float) -> float:
        return _loss(options, chosen) + multiplier * (total - 1)

    chosen, total = choose(0.0)
    if total <= 1:
        return chosen, 0.0, bound(0.0, chosen, total)
    low, high = 0.0, 1.0
    while choose(high)[1] > 1 and high < 1e30:
        low, high = high, high * 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if choose(middle)[1] <= 1:
            high = middle
        else:
            low = middle
    chosen, total = choose(high)
    return chosen, high, bound(high, chosen, total)


def _fill(options: Sequence[Sequence[Option]], chosen: list[int], allowed: Mapping[str, float]) -> list[int]:
    """Spend what is left: again and again the affordable step that saves most loss per normalised cost."""
    chosen = list(chosen)
    spent = {key: _total(options, chosen, key) for key in allowed}
    while True:
        best: tuple[float, int, int] | None = None
        for s, site in enumerate(options):
            now = site[chosen[s]]
            for k, option in enumerate(site):
                gain = now.loss - option.loss
                extra = {key: getattr(option.cost, key) - getattr(now.cost, key) for key in allowed}
                if gain <= 0 or any(spent[key] + extra[key] > limit for key, limit in allowed.items()):
                    continue
                rise = max(sum(max(extra[key], 0) / limit for key, limit in allowed.items()), 1e-12)
                if best is None or gain / rise > best[0]:
                    best = (gain / rise, s, k)
        if best is None:
            return chosen
        _, s, k = best
        for key in allowed:
            spent[key] += getattr(options[s][k].cost, key) - getattr(options[s][chosen[s]].cost, key)
        chosen[s] = k


def prefer_compressed(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> list[int]:
    """Take dense sites into the compressed space where that is as good, within the band of the prediction.

    All of them together may add three hundredths to the predicted loss, each an equal share of it, and each must save
    one hundredth of its parameters.
    """
    chosen = list(chosen)
    dense = [s for s, site in enumerate(options) if chosen[s] == len(site) - 1]
    share = _BAND * _loss(options, chosen) / max(len(dense), 1)
    for s in dense:
        whole = options[s][-1]
        most = (1 - _LEAST_SAVING) * whole.cost.params
        fitting = [k for k, o in enumerate(options[s][:-1]) if o.loss <= whole.loss + share and o.cost.params <= most]
        if fitting:
            chosen[s] = min(fitting, key=lambda k: (options[s][k].cost.params, options[s][k].loss))
    return chosen


def prefer_faster(
    options: Sequence[Sequence[Option]],
    chosen: Sequence[int],
    quantities: Sequence[str],
    seconds: Callable[[int, int], float],
) -> list[int]:
    """At each site the fastest of the options that are as good, within the band of the prediction, and cost no more of
    any of the ``quantities``.

    All of them together may add three hundredths to the predicted loss, each an equal share of it, and each must save
    two hundredths of the time; ``seconds(site, option)`` tells it.
    """
    share = _BAND * _loss(options, chosen) / max(len(options), 1)
    taken = []
    for s, (site, k) in enumerate(zip(options, chosen, strict=True)):
        most = {key: getattr(site[k].cost, key) for key in quantities}
        fitting = [
            j
            for j, o in enumerate(site)
            if o.loss <= site[k].loss + share and all(getattr(o.cost, key) <= limit for key, limit in most.items())
        ]
        times = {j: seconds(s, j) for j in dict.fromkeys((k, *fitting))} if len(fitting) > 1 else {k: 0.0}
        best = min(times, key=lambda j: (times[j], site[j].loss))
        taken.append(best if times[best] < _FASTER * times[k] else k)
    return taken


def _cheapest(options: Sequence[Sequence[Option]], allowed: Mapping[str, float]) -> list[int]:
    price = _price_of(allowed, dict.fromkeys(allowed, 1.0))
    return [min(range(len(site)), key=lambda k: price(site[k].cost)) for site in options]


def _total(options: Sequence[Sequence[Option]], chosen: Sequence[int], key: str) -> float:
    return sum(getattr(site[k].cost, key) for site, k in zip(options, chosen, strict=True))


def _loss(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(site[k].loss for site, k in zip(options, chosen, strict=True))


def allocate_uniform(options: Sequence[Sequence[Option]], budget: Budget) -> list[int]:
    """For every site the option of least loss, then of least cost, that keeps the budget on that site alone.

    Raises BudgetError with the nearest budget that every site can reach.
    """
    dense = [site[-1].cost for site in options]
    shares = [
        {key: min(_share(o.cost, d, key) for o in site) for key, _ in budget.limits}
        for site, d in zip(options, dense, strict=True)
    ]
    _refuse_unreachable({key: max(share[key] for share in shares) for key, _ in budget.limits}, budget)
    chosen = []
    for site, whole in zip(options, dense, strict=True):
        allowed = budget.allowance(whole)
        fitting = [
            k for k, o in enumerate(site) if all(getattr(o.cost, key) <= limit for key, limit in allowed.items())
        ]
        chosen.append(min(fitting, key=lambda k: (site[k].loss, site[k].cost.params)))
    return chosen


def _share(cost: Cost, dense: Cost, key: str) -> float:
    whole = getattr(dense, key)
    return float(getattr(cost, key) / whole) if whole else 0.0


def allocate_suggested(options: Sequence[Sequence[Option]]) -> list[int]:
    """For every site, without a budget, one of the options whose ranks the weight suggests; the last option is dense,
    and taken where there is no other.

    Each format calls another part of the weight noise, so that neither the smallest nor the most accurate one is the
    best: it is the one of least ``n ln(loss) + params ln(n)``, n the numbers in the weight (Schwarz 1978, for noise
    that is Gaussian), of several the first. ``loss``: the relative squared error; below 1e-12 it counts as rounding.
    """

    def length(option: Option, numbers: int) -> float:
        return numbers * math.log(max(option.loss, _ROUNDING)) + option.cost.params * math.log(numbers)

    taken = []
    for site in options:
        lengths = [length(option, site[-1].cost.params) for option in site[:-1]]
        taken.append(lengths.index(min(lengths)) if lengths else 0)
    return taken


def _check_reachable(options: Sequence[Sequence[Option]], budget: Budget, dense: Cost) -> None:
    least = {key: sum(min(getattr(o.cost, key) for o in site) for site in options) for key, _ in budget.limits}
    _refuse_unreachable({key: least[key] / (getattr(dense, key) or 1) for key in least}, budget)


def _refuse_unreachable(least: Mapping[str, float], budget: Budget) -> None:
    """Raise BudgetError if a limit is below the least share; the nearest budget is rounded up to four decimals."""
    if any(least[key] > keep for key, keep in budget.limits):
        nearest = ",".join(f"{key}={max(math.ceil(1e4 * least[key]) / 1e4, keep)}" for key, keep in budget.limits)
        raise BudgetError(f"the budget {budget} cannot be reached; the nearest reachable one is {nearest}")
