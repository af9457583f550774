"""The best choice of one option per site under one limit, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["multiple_choice"]

_MOST_STATES = 200_000
_ROUNDING = 1e-12


def multiple_choice(
    costs: Sequence[Sequence[float]],
    losses: Sequence[Sequence[float]],
    limit: float,
    price: float,
    start: Sequence[int],
) -> tuple[list[int], float]:
    """``minimise sum_s loss_s(k_s)  subject to  sum_s cost_s(k_s) <= limit`` (the multiple-choice knapsack problem).

    By dynamic programming over the sites, on the states that no other one beats in cost and loss (Nemhauser and Ullmann
    1969). With ``price`` >= 0 on the cost every choice loses ``bound + sum_s r_s + price (limit - cost)``, where
    ``bound = sum_s min_k (loss + price cost) - price limit`` is the Lagrangian bound and ``r_s >= 0`` the reduced loss
    of its option: options and states whose reduced losses exceed what ``start``, a choice within the limit, is above
    the bound are left out (Dyer, Kayal, Walker 1984), and few remain. Of more than 200,000 states the best of each cost
    interval are kept.

    Returns the choice, never worse than ``start``, and the bound.
    """
    priced = [
        np.asarray(loss, float) + price * np.asarray(cost, float) for cost, loss in zip(costs, losses, strict=True)
    ]
    bound = float(sum(row.min() for row in priced)) - price * limit
    best = list(start)
    least = sum(row[k] for row, k in zip(losses, best, strict=True))
    room = least - bound
    if room <= _ROUNDING * max(least, 1e-300):
        return best, min(bound, least)
    kept = [np.flatnonzero(row - row.min() <= room) for row in priced]
    order = sorted(range(len(kept)), key=lambda s: len(kept[s]))
    rest = np.array([min(costs[s][int(k)] for k in kept[s]) for s in order] + [0.0])[::-1].cumsum()[::-1]
    spent, lost, reduced = (np.zeros(1) for _ in range(3))
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for place, s in enumerate(order):
        own = kept[s]
        own_cost, own_loss = (np.asarray(rows[s], float)[own] for rows in (costs, losses))
        own_reduced = priced[s][own] - priced[s].min()
        wide = [(a[:, None] + b).ravel() for a, b in ((spent, own_cost), (lost, own_loss), (reduced, own_reduced))]
        good = np.flatnonzero((wide[0] + rest[place + 1] <= limit) & (wide[2] <= room * (1 + 1e-9)))
        good = good[_front(wide[0][good], wide[1][good])]
        if len(good) > _MOST_STATES:
            good = _thinned(good, wide[0], wide[1])
        spent, lost, reduced = (values[good] for values in wide)
        trail.append((good // len(own), own[good % len(own)]))
        if not len(good):
            return best, bound
    last = int(np.argmin(lost))
    if lost[last] < least:
        for s, (parents, taken) in zip(reversed(order), reversed(trail), strict=True):
            best[s], last = int(taken[last]), int(parents[last])
    return best, bound


def _front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Places of the entries that no other one beats, in rising order of cost."""
    order = np.lexsort((loss, cost))
    ahead = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
    return order[loss[order] < ahead]


def _thinned(good: np.ndarray, cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The entry of least loss in each of as many intervals of the cost as there may be states."""
    values = cost[good]
    width = (values[-1] - values[0]) / _MOST_STATES
    interval = ((values - values[0]) / width).astype(np.int64)
    last_of_each = np.flatnonzero(np.diff(interval, append=interval[-1] + 1))  # losses fall with the cost
    return good[last_of_each]
