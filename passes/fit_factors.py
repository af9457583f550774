"""fit-factors: the factors of every planned site, in the dtype in which they will be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdc import decompositions
from tdc.errors import VerificationError
from tdc.ir import DENSE, Candidate, Plan, Remark
from tdc.progress import track

from .base import Pass, Unit
from .propose_layouts import lowered, metric_of, site_statistics

__all__ = ["FitFactors", "left_dense"]


@dataclass(frozen=True)
class FitFactors(Pass):
    """Fits in float64 and rounds to the weight's dtype; a site whose factors overflow there stays dense, with a
    remark.
    """

    name = "fit-factors"

    def requires(self, unit: Unit) -> None:
        if unit.plan is None:
            raise VerificationError("fit-factors needs a plan")

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        known = site_statistics(unit)
        planned = [choice for choice in unit.plan.choices if not choice.is_dense]
        factors: dict[int, Mapping[str, Tensor]] = {}
        failed: dict[int, Remark] = {}
        for choice in track(planned, "fitting factors", show=unit.options.progress):
            site = choice.site
            weight = unit.program.weight(site)
            layout, _ = lowered(unit.target, choice)
            double = weight.double()
            metric = metric_of(unit, site, known.get(site.order), double)
            fitted = decompositions.fit(decompositions.get(choice.decomposition), double, layout, metric)
            stored = {k: f.to(weight.dtype).contiguous() if f.is_floating_point() else f for k, f in fitted.items()}
            if all(bool(torch.isfinite(f).all()) for f in stored.values()):
                factors[site.order] = stored
            else:
                reason = f"{choice.decomposition} factors overflow {site.dtype}: stays dense"
                failed[site.order] = Remark(site.name, self.name, reason)
        return left_dense(unit, failed).having(factors=factors)


def left_dense(unit: Unit, failed: Mapping[int, Remark]) -> Unit:
    """The unit with some sites back to dense in its plan, each with its remark."""
    if not failed:
        return unit
    plan: Plan | None = unit.plan
    assert plan is not None
    reads = {site.order: site.pointwise_consumer for site in unit.sites}
    choices = tuple(
        _dense(c) if c.site.order in failed else replace(c, folded=c.folded and reads[c.site.order] not in failed)
        for c in plan.choices
    )
    unit = unit.remarking(*failed.values())
    factors = {order: f for order, f in unit.factors.items() if order not in failed}
    return unit.having(plan=replace(plan, choices=choices, remarks=unit.remarks), factors=factors)


def _dense(choice: Candidate) -> Candidate:
    return replace(choice, decomposition=DENSE, variant="", ranks=(), folded=False, error=0.0, cost=choice.dense_cost)
