"""bind-plan: a plan that was made before, matched to the sites of this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tdc import decompositions
from tdc.errors import CalibrationError, OptionError, PlanError
from tdc.ir import Candidate, Decline, Plan, Remark, Site, assign
from tdc.planning.cost import block_cost, dense_cost
from tdc.statistics import SiteStatistics

from ._hidden import hidden_members, sites_of
from .base import Pass, Unit
from .propose_joint import members_of, with_costs
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
        bound: list[Candidate] = []
        remarks, known = [], site_statistics(unit)
        if plan.metric == "fisher" and unit.statistics is not None and not unit.statistics.gradients:
            remarks.append(Remark("", self.name, "the statistics have no output gradients: fitted in the input metric"))
            plan = replace(plan, metric="input")
        for choice, site in zip(plan.choices, found, strict=True):
            if site is None:
                raise PlanError(_misfit(choice.site, unit))
            bound.append(replace(choice, site=site, hidden=None if choice.is_dense else choice.hidden))
        _check_hidden(bound, {site.order: site for site in unit.sites}, plan.metric)
        bound, apart = _whole_groups(bound)
        remarks += apart
        bound = [_bound(choice, unit, known.get(choice.site.order)) for choice in bound]
        bound = _with_group_costs(bound, unit, known)
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


def _whole_groups(bound: list[Candidate]) -> tuple[list[Candidate], list[Remark]]:
    """Sites of a joint group that is not whole here are fitted by themselves, with at most their own full ranks."""
    alone: dict[int, Candidate] = {}
    for members in members_of(bound).values():
        layouts = {(c.decomposition, c.variant, c.ranks, c.joint) for c in members}
        joint = members[0].joint
        if len(layouts) > 1 or joint is None or sum(c.site.axes["o"] for c in members) != joint.outputs:
            alone |= {c.site.order: c for c in members}
    remarks = [
        Remark(c.site.name, BindPlan.name, "the other sites of its joint group are not here: fitted by itself")
        for c in alone.values()
    ]
    return [_alone(c) if c.site.order in alone else c for c in bound], remarks


def _check_hidden(bound: list[Candidate], here: Mapping[int, Site], metric: str) -> None:
    """Raises PlanError where hidden units are to be left out that this model does not have, or by some of the sites
    around them only, or without a moment of them.
    """
    for members in hidden_members(bound).values():
        reader = members[-1]
        own = sites_of(reader.site, here) or ()
        told = {(c.site.order, c.hidden.axis, c.hidden.width) for c in members if c.hidden is not None}
        width = reader.hidden.width if reader.hidden else 0
        wanted = {(s.order, "i" if s is own[-1] else "o", width) for s in own}
        if told != wanted or not 1 <= width <= reader.site.axes["i"]:
            names = ", ".join(c.site.name for c in members)
            raise PlanError(
                f"the plan keeps {width} hidden units between {names}: they cannot be left out here, or other sites "
                f"around them are dense in the plan"
            )
        if metric == "weight":
            raise PlanError(f"the plan leaves out what {reader.site.name} reads: metric must be input or fisher")


def _alone(choice: Candidate) -> Candidate:
    if choice.is_dense:
        return replace(choice, joint=None)
    full = decompositions.get(choice.decomposition).full_ranks(choice.site.axes, choice.variant)
    ranks = tuple((axis, min(rank, full.get(axis, rank))) for axis, rank in choice.ranks)
    return replace(choice, joint=None, ranks=ranks)


def _with_group_costs(bound: list[Candidate], unit: Unit, known: Mapping[int, SiteStatistics]) -> list[Candidate]:
    """Raises PlanError for a group that cannot share factors."""
    costs: dict[int, Candidate] = {}
    for members in members_of(bound).values():
        made = with_costs(unit, members, known)
        if made is None:
            raise PlanError(f"{members[0].site.name}: {members[0].decomposition} cannot be shared by several sites")
        costs |= {c.site.order: c for c in made}
    return [costs.get(c.site.order, c) for c in bound]


def _bound(choice: Candidate, unit: Unit, entry: SiteStatistics | None) -> Candidate:
    site = choice.site
    work = Work.of(unit, site, entry)
    full = replace(dense_cost(site, work.rows, work.ratios), seconds=choice.dense_cost.seconds)
    here = replace(choice, cost=full, dense_cost=full, folded=False)
    if choice.is_dense:
        return here
    try:
        decomposition = decompositions.get(choice.decomposition)
    except OptionError as error:
        raise PlanError(f"{site.name}: {error}") from error
    if not decomposition.variants(site.axes) and choice.hidden is None:
        raise PlanError(f"{site.name}: {choice.decomposition} does not apply to {site.kind.value} sites")
    try:
        layout, block = lowered(unit.target, here)
    except ValueError as error:
        raise PlanError(f"{site.name} ({site.label}): {error}") from error
    if isinstance(block, Decline):
        raise PlanError(f"{site.name}: {block.reason}")
    cost = block_cost(site, layout, block, work.rows, work.ratios)
    return replace(here, cost=replace(cost, seconds=choice.cost.seconds))


def _misfit(wanted: Site, unit: Unit) -> str:
    here = next((site for site in unit.sites if set(site.names) & set(wanted.names)), None)
    left_out = next((r for r in unit.remarks if r.site in wanted.names and r.stage == "find-sites"), None)
    if here is None and left_out is not None:
        return f"the plan's site {wanted.name} is no site of this model: {left_out.reason}"
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
