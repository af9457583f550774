"""fit-factors: the factors of every planned site, in the dtype in which they will be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdc import decompositions
from tdc.errors import VerificationError
from tdc.ir import DENSE, Candidate, Metric, Plan, Remark
from tdc.progress import counted
from tdc.statistics import SiteStatistics

from ._anchor import Anchored, anchors_of, held_out, loses_more
from .base import Pass, Unit
from .propose_layouts import lowered, metric_name, metric_of, site_statistics

__all__ = ["FitFactors", "left_dense"]


@dataclass(frozen=True)
class FitFactors(Pass):
    """Fits in float64 and rounds to the weight's dtype; a site whose factors overflow there stays dense, with a
    remark.

    Where calibration data is at hand and the door can run the model in parts, each site is fitted on what the sites
    before it, already cut, make of the data (see :class:`._anchor.Anchored`). Of four batches or more the last are
    kept apart: where the outputs move more on them than with fits on what the dense model makes of it, those are taken.
    """

    name = "fit-factors"

    def requires(self, unit: Unit) -> None:
        if unit.plan is None:
            raise VerificationError("fit-factors needs a plan")

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        planned = {choice.site.order: choice for choice in unit.plan.choices if not choice.is_dense}
        with counted("fitting factors", len(planned), show=unit.options.progress) as advance:
            visit, unit = _anchored(unit, planned, advance)
        failed = {
            order: Remark(planned[order].site.name, self.name, _overflow(planned[order])) for order in visit.overflown
        }
        return left_dense(unit, failed).having(
            factors=visit.factors, shifts=visit.shifts, anchored=frozenset(visit.anchored)
        )


def _anchored(unit: Unit, planned: Mapping[int, Candidate], advance: Callable[[], None]) -> tuple[Anchored, Unit]:
    """The fits, and the unit with remarks on them."""
    known = site_statistics(unit)
    anchors = anchors_of(unit, known) if metric_name(unit) != "weight" and planned else []
    apart = held_out(anchors)
    visit = _visitor(unit, planned, known, advance)
    if anchors:
        reason = unit.program.lockstep(anchors[: len(anchors) - apart], unit.sites, visit)
        if reason:
            unit = unit.remarking(Remark("", FitFactors.name, f"not fitted to the cut model's own inputs: {reason}"))
    _visit_rest(unit, visit)
    if not visit.anchored or not apart:
        return visit, unit
    plain = _visitor(unit, planned, known, lambda: None)
    _visit_rest(unit, plain)
    moved = loses_more(unit, visit, plain, anchors[-apart:])
    if moved is None:
        return visit, unit
    reason = (
        f"fits to the inputs of the cut model move the outputs by {moved[0]:.4g} on {apart} held-out batch(es), those "
        f"to the inputs of the dense model by {moved[1]:.4g}: the latter are taken"
    )
    return plain, unit.remarking(Remark("", FitFactors.name, reason))


def _visitor(
    unit: Unit, planned: Mapping[int, Candidate], known: Mapping[int, SiteStatistics], advance: Callable[[], None]
) -> Anchored:
    return Anchored(
        unit,
        planned,
        known,
        lambda site, weight: metric_of(unit, site, known.get(site.order), weight),
        lambda choice, weight, metric: _stored(unit, choice, weight, metric),
        advance,
    )


def _visit_rest(unit: Unit, visit: Anchored) -> None:
    """The sites that no batches have reached."""
    for site in unit.sites:
        if site.order not in visit.factors and site.order not in visit.overflown:
            visit(site, ())


def _overflow(choice: Candidate) -> str:
    return f"{choice.decomposition} factors overflow {choice.site.dtype}: stays dense"


def _stored(unit: Unit, choice: Candidate, weight: Tensor, metric: Metric) -> tuple[Mapping[str, Tensor], Tensor]:
    """The factors as they are stored, none if they overflow, and the weight that they rebuild, float64."""
    layout, _ = lowered(unit.target, choice)
    dtype = getattr(torch, choice.site.dtype)
    fitted = decompositions.fit(decompositions.get(choice.decomposition), weight, layout, metric)
    stored = {k: f.to(dtype).contiguous() if f.is_floating_point() else f for k, f in fitted.items()}
    if not all(bool(torch.isfinite(f).all()) for f in stored.values()):
        return {}, weight
    double = {k: f.double() if f.is_floating_point() else f for k, f in stored.items()}
    return stored, decompositions.rebuild(double, layout).reshape(weight.shape)


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
