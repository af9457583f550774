"""fit-factors: the factors of every planned site, in the dtype in which they will be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdc import decompositions
from tdc.errors import VerificationError
from tdc.ir import DENSE, Candidate, Metric, Plan, Remark
from tdc.progress import counted

from ._anchor import Anchored, anchors_of
from ._hidden import KEPT, hidden_members, kept_units, narrowed, widened
from .base import Pass, Unit
from .propose_joint import members_of
from .propose_layouts import lowered, metric_name, metric_of, site_statistics

__all__ = ["FitFactors", "left_dense"]


@dataclass(frozen=True)
class FitFactors(Pass):
    """Fits in float64 and rounds to the weight's dtype; a site whose factors overflow there stays dense, with a
    remark.

    Where calibration data is at hand and the door can run the model in parts, each site is fitted on what the sites
    before it, already cut, make of the data (see :class:`._anchor.Anchored`).
    """

    name = "fit-factors"

    def requires(self, unit: Unit) -> None:
        if unit.plan is None:
            raise VerificationError("fit-factors needs a plan")

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        planned = {choice.site.order: choice for choice in unit.plan.choices if not choice.is_dense}
        unit = unit.having(kept=kept_units(unit, unit.plan))
        with counted("fitting factors", len(planned), show=unit.options.progress) as advance:
            visit, unit = _anchored(unit, planned, advance)
        failed = {
            order: Remark(planned[order].site.name, self.name, _overflow(planned[order])) for order in visit.overflown
        }
        unit = unit.having(factors=visit.factors, shifts=visit.shifts, anchored=frozenset(visit.anchored))
        return left_dense(unit, failed)


def _anchored(unit: Unit, planned: Mapping[int, Candidate], advance: Callable[[], None]) -> tuple[Anchored, Unit]:
    """The fits, and the unit with a remark where they could not be anchored."""
    known = site_statistics(unit)
    visit = Anchored(
        unit,
        planned,
        known,
        lambda site, weight: metric_of(unit, site, known.get(site.order), weight),
        lambda choices, weights, metrics: _stored(unit, choices, weights, metrics),
        advance,
    )
    anchors = anchors_of(unit, known) if metric_name(unit) != "weight" and planned else []
    if 0 < len(anchors) < len(unit.anchors):
        told = f"fitted on what the cut model makes of {len(anchors)} of the {len(unit.anchors)} batches: memory"
        unit = unit.remarking(Remark("", FitFactors.name, told))
    if anchors:
        reason = unit.program.lockstep(anchors, [choice.site for choice in planned.values()], visit)
        if reason:
            unit = unit.remarking(Remark("", FitFactors.name, f"not fitted to the cut model's own inputs: {reason}"))
    for site in unit.sites:  # those that no batch has reached
        if site.order not in visit.factors and site.order not in visit.overflown:
            visit(site, ())
    return visit, unit


def _overflow(choice: Candidate) -> str:
    return f"{choice.decomposition} factors overflow {choice.site.dtype}: stays dense"


def _stored(
    unit: Unit, choices: Sequence[Candidate], weights: Sequence[Tensor], metrics: Sequence[Metric]
) -> list[tuple[Mapping[str, Tensor], Tensor]]:
    """Of each weight the factors as they are stored, none if they overflow, and what they rebuild, float64."""
    layouts = [lowered(unit.target, choice)[0] for choice in choices]
    decomposition, joint = decompositions.get(choices[0].decomposition), choices[0].joint
    kept = [unit.kept.get(c.hidden.group if c.hidden else 0, torch.empty(0, dtype=torch.long)) for c in choices]
    if joint is None:
        smaller = narrowed(choices[0].hidden, kept[0], weights[0], metrics[0])
        fits = [decompositions.fit(decomposition, smaller[0], layouts[0], smaller[1])]
    else:
        whole = decompositions.stacked(weights, metrics, [choice.sensitivity for choice in choices])
        fits = decompositions.fit_stacked(decomposition, whole, layouts[0].with_size("o", joint.outputs), layouts)
    found: list[tuple[Mapping[str, Tensor], Tensor]] = []
    dtype = getattr(torch, choices[0].site.dtype)
    rounded: dict[int, Tensor] = {}  # those that are shared stay so
    for choice, own, weight, layout, factors in zip(choices, kept, weights, layouts, fits, strict=True):
        for f in factors.values():
            rounded[id(f)] = rounded.get(id(f), f.to(dtype).contiguous() if f.is_floating_point() else f)
        stored = {k: rounded[id(f)] for k, f in factors.items()}
        double = {k: f.double() if f.is_floating_point() else f for k, f in stored.items()}
        fine = all(bool(torch.isfinite(f).all()) for f in stored.values())
        rebuilt = widened(choice.hidden, own, decompositions.rebuild(double, layout), weight) if fine else weight
        beside = {KEPT: own} if choice.hidden is not None else {}
        found.append(({**stored, **beside} if fine else {}, rebuilt.reshape(weight.shape)))
    return found


def left_dense(unit: Unit, failed: Mapping[int, Remark]) -> Unit:
    """The unit with some sites back to dense in its plan, each with its remark."""
    if not failed:
        return unit
    plan: Plan | None = unit.plan
    assert plan is not None
    failed = {**failed, **_beside(plan, failed)}
    reads = {site.order: site.pointwise_consumer for site in unit.sites}
    choices = tuple(
        _dense(c) if c.site.order in failed else replace(c, folded=c.folded and reads[c.site.order] not in failed)
        for c in plan.choices
    )
    unit = unit.remarking(*failed.values())
    factors = {order: f for order, f in unit.factors.items() if order not in failed}
    return unit.having(plan=replace(plan, choices=choices, remarks=unit.remarks), factors=factors)


def _beside(plan: Plan, failed: Mapping[int, Remark]) -> dict[int, Remark]:
    """The sites of a joint group of which one stays dense: they do too, since it may bear what they share; and those
    around hidden units, of which none is left out then.
    """
    found: dict[int, Remark] = {}
    groups = [(members, "shares factors with") for members in members_of(plan.choices).values()]
    groups += [(members, "has hidden units in common with") for members in hidden_members(plan.choices).values()]
    for members, shares in groups:
        first = next((c for c in members if c.site.order in failed), None)
        if first is not None:
            stage = failed[first.site.order].stage
            reason = f"{shares} {first.site.name}: stays dense with it"
            rest = [c for c in members if c.site.order not in failed]
            found |= {c.site.order: Remark(c.site.name, stage, reason) for c in rest}
    return found


def _dense(choice: Candidate) -> Candidate:
    bare = replace(choice, decomposition=DENSE, variant="", ranks=(), folded=False, joint=None, hidden=None)
    return replace(bare, error=0.0, cost=choice.dense_cost)
