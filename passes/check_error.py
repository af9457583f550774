"""check-error: what the stored factors really lose, measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdc import decompositions
from tdc.ir import Metric, Remark

from ._errors import optimism, relative_error
from ._hidden import widened
from .base import Pass, SiteErrors, Unit
from .fit_factors import left_dense
from .propose_layouts import lowered, metric_of, site_statistics

__all__ = ["CheckError"]

_ROUNDING = 1e-4
"""Relative squared error that rounding of factors to half precision may add before it is remarked on."""

_CANCELS = 100.0
"""Cancellation above which it is remarked on: two digits of the factors are lost in the weight."""


@dataclass(frozen=True)
class CheckError(Pass):
    """Rebuilds every site from its stored factors and measures the relative squared error, in the metric and of the
    weight, the former as it is to be expected on other data than those of the fit; and what its bias must take up,
    ``(W - W_hat) E[x]``.

    A site that lost everything (error 1 or more: worse than a zero weight) stays dense; one that lost more than planned
    gets a remark.
    """

    name = "check-error"

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        known = site_statistics(unit)
        errors: dict[int, SiteErrors] = {}
        shifts: dict[int, Tensor] = {}
        failed: dict[int, Remark] = {}
        remarks = []
        for choice in unit.plan.choices:
            order = choice.site.order
            if order not in unit.factors:
                continue
            weight = unit.program.weight(choice.site).double()
            stored = {k: f.double() if f.is_floating_point() else f for k, f in unit.factors[order].items()}
            layout, _ = lowered(unit.target, choice)
            rebuilt = decompositions.rebuild(stored, layout)
            if choice.hidden is not None:
                rebuilt = widened(choice.hidden, unit.kept[choice.hidden.group], rebuilt, weight)
            metric = metric_of(unit, choice.site, known.get(order), weight, fitting=False)
            expected = optimism(choice, layout, known.get(order)) if metric.name != "weight" else 1.0
            errors[order] = found = SiteErrors(
                expected * relative_error(weight, rebuilt, metric, choice.site),
                relative_error(weight, rebuilt, Metric("weight"), choice.site),
                decompositions.cancellation(stored, layout),
            )
            by_itself = order not in unit.anchored and choice.joint is None
            shift = unit.shifts[order] if order in unit.shifts else decompositions.bias_shift(weight - rebuilt, metric)
            if shift is not None:
                shifts[order] = shift
            if not found.metric < 1:
                reason = f"{choice.decomposition} loses it all (relative squared error {found.metric:.3g}): stays dense"
                failed[order] = Remark(choice.site.name, self.name, reason)
            elif found.cancellation > _CANCELS:
                reason = f"terms of {choice.decomposition} cancel: {found.cancellation:.3g} times the weight in size"
                remarks.append(Remark(choice.site.name, self.name, reason))
            elif by_itself and choice.error and found.metric > choice.error * 1.1 + _ROUNDING:
                reason = f"relative squared error {found.metric:.3g} where the plan says {choice.error:.3g}"
                remarks.append(Remark(choice.site.name, self.name, reason))
        unit = left_dense(unit, failed).remarking(*remarks)
        kept = {order: e for order, e in errors.items() if order not in failed}
        return unit.having(errors=kept, shifts={order: s for order, s in shifts.items() if order in kept})
