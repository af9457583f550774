"""The smallest plan that loses no more than is allowed: plans are made, fitted and measured until one is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import decompositions
from .errors import BudgetError, OptionError
from .frontends.program import Change
from .ir import Remark
from .passes._hidden import widened
from .passes.base import Pass, Unit
from .passes.check_error import CheckError
from .passes.fit_factors import FitFactors
from .passes.pipeline import CHOOSING, Pipeline
from .passes.propose_layouts import lowered
from .planning.budget import Budget
from .statistics import divergence, logits_among

__all__ = ["Goal", "evaluated", "searched"]

_ROUNDS = 8
_NEAR = 0.9
"""A plan that loses this fraction of what it may is near enough."""
_APART = 1.01
"""And so is one that keeps 1 % more than one that loses too much."""
_MARGIN = 0.95
_BATCHES = 8
_STEPS = 12


@dataclass(frozen=True)
class Goal:
    """``lost(unit)``: what a unit with factors loses; ``limit``: the most that it may; ``what``: in words."""

    lost: Callable[[Unit], float]
    limit: float
    what: str


def searched(unit: Unit, goal: Goal | None, exchange: Callable[[Pass], Pass] = lambda step: step) -> Unit:
    """The unit, whose layouts are proposed, with the plan that keeps the least of the budget's quantity and loses no
    more than the goal allows, by default the budget's loss; and with its factors.

    The predicted loss is taken for right up to a factor, which the last measured plan gives; plans that were found to
    lose too much bound those that are tried from below, good ones from above. At most eight plans are fitted.

    Raises BudgetError if no plan that is smaller than dense loses that little.
    """
    budget = Budget.parse(unit.options.budget)
    work = _Search(unit, budget.least, goal or _own_goal(unit, budget), exchange)
    found, remark = work.run()
    assert found.plan is not None
    remarks = (*found.plan.remarks, remark)
    plan = replace(found.plan, budget=str(budget), remarks=remarks)
    return found.having(plan=plan, options=unit.options).remarking(remark)


def evaluated(evaluate: object, drop: object, dense: Any, finished: Callable[[Unit], Any]) -> Goal:
    """At most ``drop`` lost of what ``evaluate`` gives for the dense model; ``finished`` makes of a unit with factors
    what ``evaluate`` takes.
    """
    if not callable(evaluate) or drop is None:
        raise OptionError("evaluate= (a function of the model, higher is better) and metric_drop= belong together")
    if not isinstance(drop, (int, float)) or isinstance(drop, bool) or not 0 < drop < math.inf:
        raise OptionError(f"metric_drop= must be a number above 0; got {drop!r}")

    def value(model: Any) -> float:
        given = evaluate(model)
        try:
            number = float(given)
        except (TypeError, ValueError):
            raise OptionError(f"evaluate= must return a number; got {type(given).__name__}") from None
        if not math.isfinite(number):
            raise OptionError(f"evaluate= returned {number}")
        return number

    before = value(dense)
    return Goal(lambda unit: before - value(finished(unit)), float(drop), f"of {before:.6g} by evaluate")


def _own_goal(unit: Unit, budget: Budget) -> Goal:
    if budget.loss is None:
        raise OptionError(f"the budget {budget} needs a limit: write 'loss=0.01,{budget}', or give evaluate=")
    batches = list(unit.program.batches(unit.probe)) if unit.probe is not None else list(unit.anchors)
    if not batches:
        raise OptionError("a budget of loss= is measured: give calibration=, or probe= batches beside statistics=")
    batches = batches[:: -(-len(batches) // _BATCHES)]
    references = [unit.outputs(batch) for batch in batches]
    logits = logits_among(unit.program.outputs(batches[0], {}))

    def lost(fitted: Unit) -> float:
        changes = _changes(fitted)
        pairs = zip(batches, references, strict=True)
        return sum(divergence(old, unit.outputs(b, changes), logits) for b, old in pairs) / len(batches)

    data = "probe" if unit.probe is not None else "calibration"
    return Goal(lost, budget.loss, f"of the outputs on {len(batches)} {data} batch(es)")


def _changes(unit: Unit) -> dict[int, Change]:
    """The weights that the factors of a unit stand for."""
    assert unit.plan is not None
    changes = {}
    for choice in unit.plan.choices:
        stored = unit.factors.get(choice.site.order)
        if stored is not None:
            weight = _rebuilt(unit, choice, stored)
            changes[choice.site.order] = Change(weight, unit.shifts.get(choice.site.order))
    return changes


def _rebuilt(unit: Unit, choice: Any, stored: Any) -> Tensor:
    like = unit.program.weight(choice.site)
    double = {k: f.double() if f.is_floating_point() else f for k, f in stored.items()}
    small = decompositions.rebuild(double, lowered(unit.target, choice)[0])
    if choice.hidden is not None:
        small = widened(choice.hidden, unit.kept[choice.hidden.group], small, like)
    return small.reshape(like.shape).to(like.dtype)


@dataclass
class _Search:
    unit: Unit
    quantity: str
    goal: Goal
    exchange: Callable[[Pass], Pass]
    predictions: dict[float, float] = field(default_factory=dict)

    def run(self) -> tuple[Unit, Remark]:
        least, limit = self._least(), self.goal.limit
        low, high, best = least, 1.0, None
        tried: list[tuple[float, float]] = []
        keep = self._within(limit * _MARGIN, low, high)
        while len(tried) < _ROUNDS:
            fitted = self._fitted(keep)
            lost = self.goal.lost(fitted) if fitted.factors or keep == 1 else math.inf  # its fits lose it all
            tried.append((keep, lost))
            if lost <= limit:
                best, high = fitted, keep
            else:
                low = keep
            if (best is fitted and (lost >= _NEAR * limit or keep <= least * _APART)) or high <= low * _APART:
                break
            predicted = self._predicted(keep)
            factor = lost / predicted if min(lost, predicted) > 0 else 0.5
            keep = self._within(limit * _MARGIN / factor, low, high)
            if not low * _APART**0.5 < keep < high / _APART**0.5:
                keep = (low * high) ** 0.5
        if best is None or not best.factors:
            raise BudgetError(self._nothing([pair for pair in tried if pair[1] > limit]))
        lost = dict(tried)[high]
        reason = f"{self.quantity}={high:.4g} loses {lost:.4g} {self.goal.what}; {len(tried)} plans were measured"
        return best, Remark("", "search-plan", reason)

    def _nothing(self, tried: Sequence[tuple[float, float]]) -> str:
        """Why no plan was found; ``tried``: what stayed, and the loss of that, above the limit."""
        if not tried:
            return "nothing can be replaced by something smaller: the smallest plan is the dense model"
        keep, lost = min(tried, key=lambda pair: pair[1])
        return (
            f"nothing smaller than dense that was tried stays within the limit of {self.goal.limit:g} "
            f"{self.goal.what}: {self.quantity}={keep:.4g} loses {lost:.4g}"
        )

    def _chosen(self, keep: float) -> Unit:
        options = replace(self.unit.options, budget={self.quantity: keep})
        return Pipeline([self.exchange(step) for step in CHOOSING]).run(self.unit.having(options=options))

    def _fitted(self, keep: float) -> Unit:
        return Pipeline([self.exchange(step) for step in (FitFactors(), CheckError())]).run(self._chosen(keep))

    def _predicted(self, keep: float) -> float:
        if keep not in self.predictions:
            plan = self._chosen(keep).plan
            assert plan is not None
            self.predictions[keep] = plan.loss
        return self.predictions[keep]

    def _least(self) -> float:
        rows: Sequence[Any] = [self.unit.candidates[site.order] for site in self.unit.sites]
        least = sum(min(getattr(c.cost, self.quantity) for c in row) for row in rows)
        return min(1.0, least / max(1, sum(getattr(row[-1].cost, self.quantity) for row in rows)) * (1 + 1e-9))

    def _within(self, loss: float, low: float, high: float) -> float:
        """What stays at least where no more than that is predicted to be lost, between the two."""
        if self._predicted(low) <= loss:
            return low
        for _ in range(_STEPS):
            middle = (low * high) ** 0.5
            if self._predicted(middle) <= loss:
                high = middle
            else:
                low = middle
            if high <= low * _APART**0.25:
                break
        return high
