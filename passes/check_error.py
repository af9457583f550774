"""check-error: what the stored factors really lose, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import Remark

from .base import Pass, SiteErrors, Unit
from .fit_factors import left_dense
from .propose_layouts import lowered, metric_of, site_statistics

__all__ = ["CheckError"]

_ROUNDING = 1e-4
"""Relative squared error that rounding of factors to half precision may add before it is remarked on."""


@dataclass(frozen=True)
class CheckError(Pass):
    """Rebuilds every site from its stored factors and measures the relative squared error, in the metric and of the
    weight.

    A site that lost everything (error 1 or more: worse than a zero weight) stays dense; one that lost more than planned
    gets a remark.
    """

    name = "check-error"

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        known = site_statistics(unit)
        errors: dict[int, SiteErrors] = {}
        failed: dict[int, Remark] = {}
        remarks = []
        for choice in unit.plan.choices:
            order = choice.site.order
            if order not in unit.factors:
                continue
            weight = unit.program.weight(choice.site).double()
            stored = {k: f.double() if f.is_floating_point() else f for k, f in unit.factors[order].items()}
            difference = weight - decompositions.rebuild(stored, lowered(unit.target, choice)[0])
            metric = metric_of(unit, known.get(order))
            errors[order] = found = SiteErrors(
                _relative(difference, weight, metric.second_moment), _relative(difference, weight, None)
            )
            if not found.metric < 1:
                reason = f"{choice.decomposition} loses it all (relative squared error {found.metric:.3g}): stays dense"
                failed[order] = Remark(choice.site.name, self.name, reason)
            elif choice.error and found.metric > choice.error * 1.1 + _ROUNDING:
                reason = f"relative squared error {found.metric:.3g} where the plan says {choice.error:.3g}"
                remarks.append(Remark(choice.site.name, self.name, reason))
        unit = left_dense(unit, failed).remarking(*remarks)
        return unit.having(errors={order: e for order, e in errors.items() if order not in failed})


def _relative(difference: Tensor, weight: Tensor, second: Tensor | None) -> float:
    """``tr(D S D^T) / tr(W S W^T)``; 0 if both vanish."""

    def square(matrix: Tensor) -> float:
        product = matrix if second is None else matrix @ second
        return max(float(torch.sum(product * matrix)), 0.0)

    lost, whole = square(difference), square(weight)
    if whole == 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / whole
