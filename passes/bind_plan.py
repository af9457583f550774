"""bind-plan: a plan that was made before, matched to the sites of this model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdc import decompositions
from tdc.errors import CalibrationError, OptionError, PlanError
from tdc.ir import Candidate, Decline, Plan, Remark, Site, assign
from tdc.planning.cost import block_cost, dense_cost
from tdc.statistics import SiteStatistics

from .base import Pass, Unit
from .propose_layouts import Work, lowered, site_statistics

__all__ = ["BindPlan"]


@dataclass(frozen=True)
class BindPlan(Pass):
    """Finds every site of the plan by its weight and checks that its layout exists.

    Raises PlanError, naming the site, for a weight that this model does not hold, an unknown decomposition or
    impossible ranks; CalibrationError if the plan's metric needs statistics and there are none.
    """

    name = "bind-plan"

    def run(self, unit: Unit) -> Unit:
        plan = unit.plan
        assert plan is not None
        if not plan.choices:
            raise PlanError("the plan has no sites: there is nothing to apply")
        if plan.metric != "weight" and unit.statistics is None:
            raise CalibrationError(
                f"the plan was made in the {plan.metric} metric: give statistics= or calibration= to apply it"
            )
        found = assign([choice.site for choice in plan.choices], unit.sites)
        bound, remarks, known = [], [], site_statistics(unit)
        if plan.metric == "fisher" and unit.statistics is not None and not unit.statistics.gradients:
            remarks.append(Remark("", self.name, "the statistics have no output gradients: fitted in the input metric"))
            plan = replace(plan, metric="input")
        for choice, site in zip(plan.choices, found, strict=True):
            if site is None:
                raise PlanError(_misfit(choice.site, unit))
            bound.append(_bound(choice, site, unit, known.get(site.order)))
        doubled = _doubled(bound)
        if doubled:
            raise PlanError(f"the plan decides twice for {doubled}")
        if plan.statistics and unit.statistics is not None and plan.statistics != unit.statistics.digest:
            reason = (
                f"the plan was made with statistics {plan.statistics[:12]}; "
                f"its factors are fitted with {unit.statistics.digest[:12]}"
            )
            remarks.append(Remark("", self.name, reason))
        planned = {choice.site.order for choice in bound}
        remarks += [
            Remark(s.name, self.name, "not in the plan: stays dense") for s in unit.sites if s.order not in planned
        ]
        choices = tuple(sorted(bound, key=lambda choice: choice.site.order))
        unit = unit.remarking(*remarks, *_still_true(plan, choices))
        return unit.having(plan=replace(plan, choices=choices, remarks=unit.remarks))


def _still_true(plan: Plan, choices: tuple[Candidate, ...]) -> list[Remark]:
    """What the plan said on being made, of sites that it leaves dense."""
    dense = {name for choice in choices if choice.is_dense for name in choice.site.names}
    return [remark for remark in plan.remarks if remark.stage == "choose-plan" and remark.site in dense]


def _bound(choice: Candidate, site: Site, unit: Unit, entry: SiteStatistics | None) -> Candidate:
    work = Work.of(unit, site, entry)
    full = dense_cost(site, work.rows, work.ratios)
    here = replace(choice, site=site, cost=full, dense_cost=full, folded=False)
    if choice.is_dense:
        return here
    try:
        decomposition = decompositions.get(choice.decomposition)
    except OptionError as error:
        raise PlanError(f"{site.name}: {error}") from error
    if not decomposition.variants(site.axes):
        raise PlanError(f"{site.name}: {choice.decomposition} does not apply to {site.kind.value} sites")
    try:
        layout, block = lowered(unit.target, here)
    except ValueError as error:
        raise PlanError(f"{site.name} ({site.label}): {error}") from error
    if isinstance(block, Decline):
        raise PlanError(f"{site.name}: {block.reason}")
    return replace(here, cost=block_cost(site, layout, block, work.rows, work.ratios))


def _misfit(wanted: Site, unit: Unit) -> str:
    here = next((site for site in unit.sites if set(site.names) & set(wanted.names)), None)
    if here is None:
        return (
            f"the plan's site {wanted.name} ({wanted.label}) is not in this model: no weight has its shape and sketch"
        )
    if here.sizes != wanted.sizes:
        return f"the plan's site {wanted.name} is {wanted.label}, but here it is {here.label}"
    return f"the plan's site {wanted.name} has another weight in this model: its sketch does not fit. Make a new plan"


def _doubled(bound: list[Candidate]) -> str:
    seen: set[int] = set()
    for choice in bound:
        if choice.site.order in seen:
            return choice.site.name
        seen.add(choice.site.order)
    return ""
