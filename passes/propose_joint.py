"""propose-joint: for sites that read the same input, layouts of their weights one above the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tdc import decompositions
from tdc.ir import Block, Candidate, Cost, Decline, Joint, Site
from tdc.planning.budget import QUANTITIES
from tdc.planning.cost import block_cost
from tdc.progress import track
from tdc.statistics import SiteStatistics

from .base import Members, Pass, Unit
from .propose_layouts import Work, allowed, at_least, lowered, metric_of, site_statistics

__all__ = ["ProposeJoint", "members_of", "with_costs"]


@dataclass(frozen=True)
class ProposeJoint(Pass):
    """For each group of sites that have always read the very same activations (query, key and value; gate and up;
    parallel branches): every allowed layout of ``[W_1; W_2; ...]`` that costs less than they do dense, with the factors
    without outputs in common (see :mod:`tdc.decompositions._joint`).

    The error is that of all together, each weighted by the loss that it causes, so that ``sum sensitivity error`` is
    what the group loses.
    """

    name = "propose-joint"

    def run(self, unit: Unit) -> Unit:
        if unit.options.allocation != "lagrangian":
            return unit
        known = site_statistics(unit)
        found = {}
        groups = groups_of(unit.sites, known)
        for number, group in enumerate(track(groups, "proposing joint layouts", show=unit.options.progress), 1):
            options = _candidates(unit, group, number, known)
            if options:
                found[number] = options
        return unit.having(joint=found)


def groups_of(sites: Sequence[Site], known: Mapping[int, SiteStatistics]) -> list[tuple[Site, ...]]:
    """Sites, two or more, that share their input, are met once, and whose weights can stand one above the other."""
    found: dict[object, list[Site]] = {}
    for site in sites:
        entry = known.get(site.order)
        if entry is not None and entry.side == "input" and site.uses == 1 and site.axes.get("g", 1) == 1:
            others = tuple((axis, size) for axis, size in site.sizes if axis != "o")
            key = (entry.moment, site.kind, others, site.attributes, site.dtype, site.bias, site.lengths)
            found.setdefault(key, []).append(site)
    return [tuple(group) for group in found.values() if len(group) > 1]


def members_of(choices: Iterable[Candidate]) -> dict[int, Members]:
    """Group number -> choices of the joint group, in topological order."""
    groups: dict[int, list[Candidate]] = {}
    for choice in choices:
        if choice.joint is not None:
            groups.setdefault(choice.joint.group, []).append(choice)
    return {group: tuple(sorted(members, key=lambda c: c.site.order)) for group, members in groups.items()}


def _candidates(
    unit: Unit, group: Sequence[Site], number: int, known: Mapping[int, SiteStatistics]
) -> tuple[Members, ...]:
    dense = [unit.candidates[site.order][-1] for site in group]
    weights = [unit.program.weight(site).double() for site in group]
    metrics = [metric_of(unit, s, known.get(s.order), w) for s, w in zip(group, weights, strict=True)]
    whole = decompositions.stacked(weights, metrics, [c.sensitivity for c in dense])
    joint, found = Joint(number, len(whole.weight)), list[Members]()
    axes = {**group[0].axes, "o": joint.outputs}
    for decomposition in allowed(unit.options.allow):
        for variant in decomposition.variants(axes):
            if decomposition.too_large(axes, variant):
                continue
            bare = [replace(c, decomposition=decomposition.name, variant=variant, joint=joint) for c in dense]
            full = decomposition.full_ranks(axes, variant)
            step = unit.target.rank_step(min(full.values()))
            points = {}
            for ranks in at_least(unit.target, decomposition.rank_lattice(axes, step, variant), full):
                made = with_costs(unit, [replace(c, ranks=tuple(ranks.items())) for c in bare], known)
                if made is not None and _gains(made):
                    points[made] = ranks
            errors = decomposition.errors(whole.weight, axes, whole.metric, list(points.values()), variant)
            for made, error in zip(points, errors, strict=True):
                found.append(tuple(_judged(c, error, known.get(c.site.order)) for c in made))
    return tuple(found)


def _judged(candidate: Candidate, error: float, entry: SiteStatistics | None) -> Candidate:
    sensitivity = candidate.sensitivity if entry is None else float(f"{entry.sensitivity_at(error):.6g}")
    return replace(candidate, error=float(f"{error:.6g}"), sensitivity=sensitivity)


def _gains(members: Members) -> bool:
    """Whether all together take less of everything than dense."""
    new = sum((c.cost for c in members), Cost(0, 0, 0))
    old = sum((c.dense_cost for c in members), Cost(0, 0, 0))
    pairs = [(getattr(new, quantity), getattr(old, quantity)) for quantity in QUANTITIES]
    return all(less < more or less == more == 0 for less, more in pairs)


def with_costs(unit: Unit, members: Sequence[Candidate], known: Mapping[int, SiteStatistics]) -> Members | None:
    """The choices of a group with their costs: the first one bears that of what they share. None where they share
    nothing, or a block cannot be had.
    """
    made = []
    for place, choice in enumerate(members):
        site = choice.site
        try:
            layout, block = lowered(unit.target, choice)
        except ValueError:  # the rank is more than one of them has outputs
            return None
        common = decompositions.shared(layout)
        if isinstance(block, Decline) or unit.program.declines(site, block) is not None:
            return None
        if not common or not _runs_first(block, common):
            return None
        work = Work.of(unit, site, known.get(site.order))
        cost = block_cost(site, layout, block, work.rows, work.ratios, () if place == 0 else common)
        made.append(replace(choice, cost=cost))
    return tuple(made)


def _runs_first(block: Block, common: frozenset[str]) -> bool:
    """Whether all shared factors are applied to the input before any other one."""
    values = block.values_of(common)
    used = {name for op in block.ops if op.output in values for name in op.inputs}
    return all(name in used or 0 in shape for name, shape in block.factors if name in common)
