"""spearman: whether the loss that plans are chosen by puts random plans of one size in the order that is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from planning_common import (
    Case,
    Fits,
    Judge,
    add_row,
    coarse_loss,
    figure,
    known_statistics,
    proposed,
    realised,
    spearman,
)

from tdc.ir import Candidate
from tdc.passes.base import Unit

__all__ = ["compared", "loss_of", "measured_plans", "params_of", "spearman_of"]

NEAR = 10

Choices = tuple[Candidate, ...]


def loss_of(choices: Sequence[Candidate]) -> float:
    """``plan.loss``."""
    return sum(choice.sensitivity * choice.error for choice in choices)


def params_of(choices: Sequence[Candidate]) -> int:
    return sum(choice.cost.params for choice in choices)


def pools_of(unit: Unit, most: int | None) -> list[list[Candidate]]:
    """The candidates of each site; of those at most so many, evenly spread by parameters, the dense one among them."""
    pools = []
    for site in unit.sites:
        row = list(unit.candidates[site.order])
        if most is not None and len(row) > most:
            row = [row[round(k * (len(row) - 1) / (most - 1))] for k in range(most)]
        pools.append(row)
    return pools


def random_plans(pools: Sequence[Sequence[Candidate]], keep: float, count: int, seed: int = 0) -> list[Choices]:
    """Plans within 1 % of a keep. The error of each site, and of each format at it, is weighted by a random factor (log
    normal, the spread itself random), without regard to sensitivities; the plan is the one of least weighted error,
    brought to the keep by random exchanges.
    """
    random = np.random.default_rng(seed)
    limit = keep * sum(row[-1].cost.params for row in pools)
    found: dict[tuple[tuple[object, ...], ...], Choices] = {}
    while len(found) < count:
        spread = random.uniform(0.3, 2.0)
        weighted = []
        for row in pools:
            formats = {(c.decomposition, c.variant): random.normal(0, spread / 2) for c in row}
            site = random.normal(0, spread)
            weighted.append([np.exp(site + formats[c.decomposition, c.variant]) * c.error for c in row])
        plan = walked(pools, cheapest(pools, weighted, limit), limit, random)
        if plan is not None:
            found[tuple((c.decomposition, c.variant, c.ranks) for c in plan)] = plan
    return list(found.values())


def cheapest(pools: Sequence[Sequence[Candidate]], errors: Sequence[Sequence[float]], limit: float) -> list[int]:
    """Least weighted error at the lowest price of a parameter that keeps the limit."""
    low, high, best = -40.0, 5.0, [0] * len(pools)
    for _ in range(60):
        middle = (low + high) / 2
        price = np.exp(middle)
        chosen = [
            min(range(len(row)), key=lambda k: error[k] + price * row[k].cost.params)
            for row, error in zip(pools, errors, strict=True)
        ]
        if params_of([row[k] for row, k in zip(pools, chosen, strict=True)]) <= limit:
            best, high = chosen, middle
        else:
            low = middle
    return best


def walked(
    pools: Sequence[Sequence[Candidate]], chosen: list[int], limit: float, random: np.random.Generator
) -> Choices | None:
    """Random exchanges at one site each, those that come nearer to the limit taken, until it is within 1 %."""
    plan = [row[k] for row, k in zip(pools, chosen, strict=True)]
    for _ in range(400):
        apart = abs(params_of(plan) - limit)
        if apart <= 0.01 * limit:
            return tuple(plan)
        s = int(random.integers(len(pools)))
        new = pools[s][int(random.integers(len(pools[s])))]
        if abs(params_of(plan) - plan[s].cost.params + new.cost.params - limit) < apart:
            plan[s] = new
    return None


@dataclass
class Measured:
    """Random plans, the losses that are predicted and measured of them, and what they were measured with."""

    plans: list[Choices]
    predicted: list[float]
    measured: list[float]
    fits: Fits
    judge: Judge


def measured_plans(case: Case, unit: Unit, keep: float, most: int | None = None, count: int = 30) -> Measured:
    plans = random_plans(pools_of(unit, most), keep, count)
    found = Measured(plans, [loss_of(plan) for plan in plans], [], Fits(unit), Judge(unit, case.held_out))
    start = time.perf_counter()
    for plan, predicted in zip(plans, found.predicted, strict=True):
        found.measured.append(found.judge.lost(found.fits.of(plan)))
        print(f"{predicted:.5g} {found.measured[-1]:.5g} {time.perf_counter() - start:.0f} s", flush=True)
    return found


def spearman_of(
    case: Case, keep: float, cache: Path | None, most: int | None = None, count: int = 30, *, anchors: bool = True
) -> None:
    """One row for fits by themselves, one for anchored fits, one for the sum of what single sites were measured to lose
    in place of the prediction; then one a site.
    """
    known = known_statistics(case, cache)
    unit = proposed(case, known, anchors=anchors)
    found = measured_plans(case, unit, keep, most, count)
    plans, predicted, measured, fits, judge = found.plans, found.predicted, found.measured, found.fits, found.judge
    head = {"experiment": "spearman", "net": case.name}
    where = f"{count} plans at params={keep}"
    add_row({**head, "case": where, **compared(predicted, measured), "pass mark": ">= 0.9"})
    add_row({**head, "case": f"{where}, interaction across depth", **across_depth(plans, measured)})
    near = [k for k in range(count) if predicted[k] <= NEAR * min(predicted)]
    pair = [predicted[k] for k in near], [measured[k] for k in near]
    add_row({**head, "case": f"{where}, those predicted within {NEAR} times the least", **compared(*pair)})
    before = coarse_loss(known, unit)
    pair = [sum(map(before, plan)) for plan in plans], measured
    add_row({**head, "case": f"{where}, by sensitivities at 0.03 and 0.3 alone", **compared(*pair)})
    single = {c: judge.lost(fits.of([c])) for c in {c for plan in plans for c in plan if not c.is_dense}}
    summed = [sum(single.get(c, 0.0) for c in plan) for plan in plans]
    add_row({**head, "case": f"{where}, single sites measured and summed", **compared(summed, measured)})
    add_row({**head, "case": f"{where}, prediction against that sum", **compared(predicted, summed)})
    for site in unit.sites:
        own = [c for c in single if c.site.order == site.order]
        if len(own) > 2:
            pair = [c.sensitivity * c.error for c in own], [single[c] for c in own]
            add_row({**head, "case": f"{where}, {site.name} alone", **compared(*pair)})
    if not anchors:
        return
    anchored = [judge.lost(realised(unit, [c for c in plan if not c.is_dense])) for plan in plans]
    add_row({**head, "case": f"{where}, anchored fits", **compared(predicted, anchored), "pass mark": ">= 0.9"})


def across_depth(plans: Sequence[Choices], measured: Sequence[float], splits: int = 20) -> dict[str, str]:
    """Whether losses of sites add up better with weights ``1 + gamma ((L - l) / L) ** alpha`` of the l-th of L: both,
    beside a global exponent, are fitted to the logarithms on a random half of the plans, and ranks are compared on the
    other half.
    """
    each = np.array([[c.sensitivity * c.error for c in sorted(plan, key=lambda c: c.site.order)] for plan in plans])
    share = 1 - np.arange(each.shape[1]) / each.shape[1]
    wanted, random = np.log(measured), np.random.default_rng(0)
    forms = [(gamma, alpha) for gamma in (-0.9, -0.6, -0.3, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0) for alpha in (0.5, 1, 2, 4)]
    logs = [np.log(each @ (1 + gamma * share**alpha)) for gamma, alpha in forms]
    plain, fitted, taken = [], [], []
    for _ in range(splits):
        order = random.permutation(len(plans))
        own, other = np.array_split(order, 2)
        best = min(range(len(forms)), key=lambda k: np.polyfit(logs[k][own], wanted[own], 1, full=True)[1].sum())
        plain.append(spearman(logs[forms.index((0.0, 1))][other], wanted[other]))
        fitted.append(spearman(logs[best][other], wanted[other]))
        taken.append(forms[best][0])
    said = f"unseen halves of {splits} splits: {np.mean(plain):.3f} without; gamma {np.median(taken):g} as a median"
    return {"count": str(len(plans)), "spearman": f"{np.mean(fitted):.3f}", "note": said}


def compared(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, str]:
    """Spearman, the ratios of measured and predicted (where that is not next to nothing), and the range of both."""
    tells = np.asarray(predicted) > 1e-4 * max(predicted)
    ratios = np.asarray(measured)[tells] / np.asarray(predicted)[tells]
    return {
        "count": str(len(measured)),
        "spearman": f"{spearman(predicted, measured):.3f}",
        "ratio": figure(float(np.median(ratios))),
        "ratio least": figure(float(ratios.min())),
        "ratio most": figure(float(ratios.max())),
        "predicted": f"{min(predicted):.4g} to {max(predicted):.4g}",
        "measured": f"{min(measured):.4g} to {max(measured):.4g}",
    }
