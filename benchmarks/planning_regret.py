"""regret and draws: the planner's choice against the best of all plans of a net that is small enough to try them
all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from planning_common import (
    Case,
    Chain,
    Fits,
    Judge,
    add_row,
    coarse_loss,
    figure,
    known_statistics,
    proposed,
    statistics_of,
)
from planning_orders import compared, measured_plans
from torch import Tensor, nn

import tdc
from tdc.frontends.program import Change
from tdc.ir import Candidate
from tdc.passes.base import Unit
from tdc.passes.choose_plan import ChoosePlan
from tdc.passes.pipeline import Pipeline

__all__ = ["draws", "regret"]


KEEPS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def regret(case: Case, cache: Path | None) -> None:
    """All 6^5 plans of a chain of five sites measured, and the planner's choices from the same candidates."""
    for row in regrets(case, known_statistics(case, cache)):
        add_row({"experiment": "regret", "net": case.name, **row})


def draws(case: Case, count: int = 10) -> None:
    """The rank correlation and the regrets again, with other random projections in the statistics."""
    for seed in range(count):
        known = statistics_of(case, seed)
        unit = proposed(case, known)
        found = measured_plans(case, unit, 0.5)
        own = [row["regret"] for row in regrets(case, known)[1:]]
        said = ", ".join(f"{value} at {keep}" for keep, value in zip(KEEPS, own, strict=True))
        row = {"experiment": "draws", "net": case.name, "case": f"seed {seed}, {len(found.plans)} plans at params=0.5"}
        add_row({**row, **compared(found.predicted, found.measured), "regret": max(own, key=float), "note": said})


def regrets(case: Case, known: tdc.Statistics) -> list[dict[str, str]]:
    """A row of all plans, and one for each budget."""
    unit = proposed(case, known)
    rows = [six_of(unit.candidates[site.order]) for site in unit.sites]
    assert [len(row) for row in rows] == [6] * 5
    fits = Fits(unit)
    changes = [[None if c.is_dense else fits.one(c) for c in row] for row in rows]
    assert isinstance(case.model, Chain)
    lost = enumerated(case.model, case.held_out, changes)
    place = (1, 0, 3, 2, 4)
    direct = Judge(unit, case.held_out).lost(fits.of(row[k] for row, k in zip(rows, place, strict=True)))
    assert abs(direct - lost[place].mean()) < 1e-3 * direct, "the stages do not give what the model gives"
    predicted = total([[c.sensitivity * c.error for c in row] for row in rows])
    params = total([[c.cost.params for c in row] for row in rows])
    others = {"singles": total(singles(lost.mean(-1)))}
    before = coarse_loss(known, unit)
    others["coarse"] = total([[before(c) for c in row] for row in rows])
    pair = predicted.flatten()[:-1], lost.mean(-1).flatten()[:-1]
    found = [{"case": "all plans", **compared(*pair), "pass mark": ">= 0.9"}]
    for keep in KEEPS:
        near = abs(params / params.flat[-1] - keep) <= 0.01
        order = compared(predicted[near], lost.mean(-1)[near]) if near.sum() > 2 else {}
        if order:
            of_sum = compared(others["singles"][near], lost.mean(-1)[near])["spearman"]
            order["note"] = f"spearman of the single sites' measured losses, summed: {of_sum}"
        found.append({"case": f"params={keep}", **order, **at_budget(unit, rows, lost, params, others, keep)})
    return found


def six_of(row: Sequence[Candidate]) -> list[Candidate]:
    """The dense weight and five candidates, evenly spread in the logarithm of the parameters, each the one of least
    error among those that cost no more.
    """
    picked: list[Candidate] = []
    for share in np.geomspace(row[0].cost.params / row[-1].cost.params * 1.02, 0.95, 5):
        best = min((c for c in row[:-1] if c.cost.params <= share * row[-1].cost.params), key=lambda c: c.error)
        picked += [best] if best not in picked else []
    rest = [c for c in row[:-1] if c not in picked]
    picked += rest[-(5 - len(picked)) :] if len(picked) < 5 else []
    return [*sorted(picked, key=lambda c: c.cost.params), row[-1]]


def total(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """(6, 6, 6, 6, 6): the sum over the sites, for every plan."""
    return sum(np.asarray(row, float).reshape([-1 if k == s else 1 for k in range(5)]) for s, row in enumerate(rows))


def singles(lost: np.ndarray) -> list[list[float]]:
    """What each candidate loses with all other sites dense."""
    dense = [5] * 5
    return [[float(lost[(*dense[:s], k, *dense[s + 1 :])]) for k in range(6)] for s in range(5)]


@torch.no_grad()
def enumerated(model: Chain, data: Tensor, changes: Sequence[Sequence[Change | None]]) -> np.ndarray:
    """KL divergence (6, 6, 6, 6, 6, examples) of every plan; a stage runs once for every choice of those before it."""
    stages = [[changed(stage, c) for c in row] for stage, row in zip(model.stages, changes, strict=True)]
    reference, found = torch.log_softmax(model(data), -1), []

    def run(x: Tensor, depth: int) -> None:
        if depth == len(stages):
            found.append((reference.exp() * (reference - torch.log_softmax(x, -1))).sum(-1).double().numpy())
            return
        for stage in stages[depth]:
            run(stage(x), depth + 1)

    run(model.first(data), 0)
    return np.stack(found).reshape(*map(len, stages), len(data))


def changed(stage: nn.Module, change: Change | None) -> nn.Module:
    """A copy of a stage with another weight in its first layer."""
    if change is None:
        return stage
    new = copy.deepcopy(stage)
    layer = new[0]
    layer.weight.copy_(change.weight.reshape(layer.weight.shape))
    if change.shift is not None:
        layer.bias += change.shift.to(layer.bias)
    return new


def at_budget(
    unit: Unit,
    rows: Sequence[Sequence[Candidate]],
    lost: np.ndarray,
    params: np.ndarray,
    others: Mapping[str, np.ndarray],
    keep: float,
) -> dict[str, str]:
    """The planner's loss over the least, minus one. `regret halves`: the best plan picked on every second example and
    judged, as the planner's, on the others. `regret singles`: of the plan with the least sum of measured losses;
    `regret coarse`: of that with the least loss by sensitivities at 0.03 and 0.3 alone.
    """
    options = replace(unit.options, budget=f"params={keep}")
    candidates = {site.order: tuple(row) for site, row in zip(unit.sites, rows, strict=True)}
    plan = Pipeline((ChoosePlan(),)).run(unit.having(candidates=candidates, joint={}, options=options)).plan
    assert plan is not None
    decided = {c.site.order: c for c in plan.choices}
    chosen = tuple(row.index(decided[site.order]) for site, row in zip(unit.sites, rows, strict=True))
    within = params <= keep * params.flat[-1] * (1 + 1e-9)
    halves = []
    for pick, judge in ((0, 1), (1, 0)):
        best = least(lost[..., pick::2].mean(-1), within)
        halves.append(lost[(*chosen, slice(judge, None, 2))].mean() / lost[(*best, slice(judge, None, 2))].mean() - 1)
    mean = lost.mean(-1)
    best = least(mean, within)
    return {
        "planner": f"{''.join(map(str, chosen))} {mean[chosen]:.4g}",
        "best": f"{''.join(map(str, best))} {mean[best]:.4g}",
        "within": str(int(within.sum())),
        "regret": figure(mean[chosen] / mean[best] - 1),
        "regret halves": figure(float(np.mean(halves))),
        **{f"regret {name}": figure(mean[least(by, within)] / mean[best] - 1) for name, by in others.items()},
        "pass mark": "<= 0.05",
    }


def least(values: np.ndarray, within: np.ndarray) -> tuple[int, ...]:
    place = np.unravel_index(np.where(within, values, np.inf).argmin(), values.shape)
    return tuple(int(k) for k in place)
