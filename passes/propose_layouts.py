"""propose-layouts: for every site the layouts that could take its place, with cost and error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import DENSE, Block, Candidate, Cost, Decline, Layout, Metric, Remark, Site
from tdc.ir.block import without_gather
from tdc.options import takes_budget
from tdc.planning.budget import QUANTITIES, Budget
from tdc.planning.cost import block_cost, dense_cost
from tdc.planning.path import contraction_paths
from tdc.planning.unfold import Suggested
from tdc.progress import track
from tdc.statistics import SiteStatistics
from tdc.targets import Target

from ._clock import order_cost
from .base import Pass, Unit

__all__ = [
    "SMALL_ERROR",
    "ProposeLayouts",
    "Work",
    "allowed",
    "at_least",
    "lowered",
    "metric_name",
    "metric_of",
    "site_statistics",
    "useful",
]

SMALL_ERROR = 0.03
"""Relative squared error at which the sensitivity of a site that stays dense is stated."""


@dataclass(frozen=True)
class ProposeLayouts(Pass):
    """The dense weight always, and every point of every allowed decomposition's lattice that is smaller in the
    budget's terms.

    A point that is not smaller than dense in parameters, bytes and multiply-adds is not proposed. With an allocation
    that takes no budget, of each variant one point at most: the ranks that it suggests (:mod:`tdc.planning.unfold`).
    """

    name = "propose-layouts"

    def run(self, unit: Unit) -> Unit:
        chosen = allowed(unit.options.allow)
        known = site_statistics(unit)
        proposed, remarks = {}, []
        for site in track(unit.sites, "proposing layouts", show=unit.options.progress):
            options, declined = _candidates(unit, site, known.get(site.order), chosen)
            proposed[site.order] = options
            remarks += [Remark(site.name, self.name, reason) for reason in declined]
            if len(options) == 1:
                tried = ", ".join(d.name for d in chosen) or "no decomposition"
                ranks = "rank" if takes_budget(unit.options.allocation) else f"{unit.options.allocation} rank"
                remarks.append(
                    Remark(site.name, self.name, f"{site.label}: {tried} has no {ranks} that stores less than dense")
                )
        return unit.having(candidates=proposed).remarking(*remarks)


def allowed(names: Sequence[str]) -> list[decompositions.Decomposition]:
    """Those that are named; ``all`` names every one, and nothing those that are tried by default."""
    if "all" in names:
        return [decompositions.get(name) for name in decompositions.names()]
    if names:
        return [decompositions.get(name) for name in names if name != DENSE]
    return [d for d in map(decompositions.get, decompositions.names()) if d.by_default]


def metric_of(unit: Unit, site: Site, entry: SiteStatistics | None, weight: Tensor, *, fitting: bool = True) -> Metric:
    """The metric of one site: the unit's where it uses statistics and has some of this site, else ``weight``, with the
    gain of a normalisation in front folded into the weight.
    """
    name = metric_name(unit)
    if name == "weight" or entry is None or unit.statistics is None:
        gain = unit.program.gain(site)
        return Metric("weight", None if gain is None else torch.diag(gain.double().square()))
    return unit.statistics.metric(entry, weight, name, fitting=fitting)


def metric_name(unit: Unit) -> str:
    """The metric of the unit's plan, or of its options: ``auto`` is the best that the statistics serve."""
    if unit.plan is not None:
        return unit.plan.metric
    if unit.options.metric == "auto":
        return unit.statistics.metric_name if unit.statistics is not None else "weight"
    return unit.options.metric


def site_statistics(unit: Unit) -> Mapping[int, SiteStatistics]:
    """Statistics by site, empty where the unit has none."""
    return unit.statistics.of(unit.sites) if unit.statistics is not None else {}


@dataclass(frozen=True)
class Work:
    """How much runs through a site in one calibration batch, all uses together: activation rows or output positions,
    and entries of the input per position along each window axis.
    """

    rows: float
    ratios: Mapping[str, float]

    @classmethod
    def of(cls, unit: Unit, site: Site, entry: SiteStatistics | None) -> Work:
        """From the statistics, else from the lengths that the program knows, else one row per use."""
        if entry is not None and unit.statistics is not None:
            return cls(entry.seen / unit.statistics.batches, entry.ratios)
        known = {axis: entries / positions for axis, entries, positions in site.lengths if positions}
        positions = math.prod(positions for _, _, positions in site.lengths)
        strides = {window.axis: float(window.stride) for window in site.windows}
        return cls(float(site.uses * positions), known or strides)


def _sizes(candidate: Candidate) -> tuple[tuple[str, int], ...]:
    """The sizes for which the ranks of a candidate are: of its site, without the hidden units that are left out, or of
    the weights of its group.
    """
    joint, kept = candidate.joint, candidate.kept
    sizes = ((axis, kept.get(axis, size)) for axis, size in candidate.site.sizes)
    return tuple((axis, joint.outputs if joint and axis == "o" else size) for axis, size in sizes)


@lru_cache(maxsize=8192)
def _layout(name: str, axes: tuple[tuple[str, int], ...], ranks: tuple[tuple[str, int], ...], variant: str) -> Layout:
    return decompositions.get(name).layout(dict(axes), dict(ranks), variant)


def lowered(target: Target, candidate: Candidate) -> tuple[Layout, Block | Decline]:
    """The layout of a candidate that is not dense, and its block on the target. Raises ValueError for
    impossible ranks.
    """
    site = candidate.site
    layout = _layout(candidate.decomposition, _sizes(candidate), candidate.ranks, candidate.variant)
    if candidate.joint is not None:
        layout = layout.with_size("o", candidate.kept.get("o", site.axes["o"]))
    if candidate.execution == "factored":
        block = _straight(target, candidate, layout)
    else:
        block = target.lower_weight(site.kind, layout, site.windows, candidate.execution)
    if candidate.folded and isinstance(block, Block):
        block = without_gather(block)
    return layout, block


def _straight(target: Target, candidate: Candidate, layout: Layout) -> Block | Decline:
    site = candidate.site
    try:
        paths = contraction_paths(site.kind, layout, site.windows, order_cost(target, candidate, layout))
    except ValueError as error:
        return Decline(str(error))
    return target.lower(site.kind, layout, paths)


def _candidates(
    unit: Unit, site: Site, entry: SiteStatistics | None, chosen: list[decompositions.Decomposition]
) -> tuple[tuple[Candidate, ...], list[str]]:
    """Candidates in rising order of cost, the dense one last; and why decompositions have none, where that is
    to be told: of those that are named, and where a weight's own ranks leave it dense.
    """
    work = Work.of(unit, site, entry)
    sensitivity = entry.sensitivity_at(SMALL_ERROR) if entry is not None else 1.0
    full = dense_cost(site, work.rows, work.ratios)
    dense = Candidate(site, DENSE, sensitivity=sensitivity, cost=full, dense_cost=full)
    weight = unit.program.weight(site).double()
    metric = metric_of(unit, site, entry, weight)
    suggested = None if takes_budget(unit.options.allocation) else Suggested(unit.options.allocation, weight)
    options: list[Candidate] = []
    declined: list[str] = []
    for decomposition in chosen:
        found: list[Candidate | Decline] = []
        for variant in decomposition.variants(site.axes):
            lattice = _lattice(unit, site, metric, decomposition, variant, suggested)
            bare = replace(dense, decomposition=decomposition.name, variant=variant)
            found += [lattice] if isinstance(lattice, Decline) else _points(unit, bare, lattice, weight, metric, work)
        gains = [point for point in found if isinstance(point, Candidate)]
        if not gains:
            reasons = [point.reason for point in found if isinstance(point, Decline)]
            reason = reasons[0] if reasons else "it has no rank that stores less than dense"
            declined.append(f"{site.label}: {decomposition.name} is left out: {reason}")
        options += gains
    if entry is not None:
        options = [replace(c, sensitivity=float(f"{entry.sensitivity_at(c.error):.6g}")) for c in options]
    options.sort(key=lambda c: (c.cost.params, c.error, c.decomposition, c.variant))
    told = bool(unit.options.allow) or (suggested is not None and not options)
    timed = unit.options.budget is not None and Budget.parse(unit.options.budget).timed
    return (*(options if timed else useful(options)), dense), declined if told else []


def _lattice(
    unit: Unit,
    site: Site,
    metric: Metric,
    decomposition: decompositions.Decomposition,
    variant: str,
    suggested: Suggested | None,
) -> Sequence[Mapping[str, int]] | Decline:
    """The ranks of one variant that are worth a look, or why the site is none for it."""
    if reason := decomposition.too_large(site.axes, variant):
        return Decline(reason)
    if metric.output_moment is not None and decomposition.needs_input(variant):
        return Decline(f"needs the moment of {math.prod(site.matrix[2:])} inputs, which is not kept")
    full = decomposition.full_ranks(site.axes, variant)
    stepped = suggested is None and unit.options.allocation != "uniform"
    step = unit.target.rank_step(min(full.values())) if stepped else 1
    lattice = at_least(unit.target, decomposition.rank_lattice(site.axes, step, variant), full)
    if not lattice and unit.target.min_rank > 1:
        return Decline(f"{unit.target.name} wants ranks of at least {unit.target.min_rank}")
    if suggested is None or not lattice:
        return lattice
    ranks = suggested.ranks(_layout(decomposition.name, site.sizes, tuple(full.items()), variant), full)
    return ranks if isinstance(ranks, Decline) else [ranks]


def at_least(
    target: Target, lattice: Sequence[Mapping[str, int]], full: Mapping[str, int]
) -> Sequence[Mapping[str, int]]:
    """The ranks none of which is below what suits the target, as far as full rank allows."""
    least = {axis: min(target.min_rank, rank) for axis, rank in full.items()}
    return [ranks for ranks in lattice if all(rank >= least.get(axis, 1) for axis, rank in ranks.items())]


def _points(
    unit: Unit, bare: Candidate, lattice: Sequence[Mapping[str, int]], weight: Tensor, metric: Metric, work: Work
) -> list[Candidate | Decline]:
    """One variant's candidates, and why points of its lattice are none; no error is worked out if all are none."""
    points = [_executed(unit, replace(bare, ranks=tuple(ranks.items())), work) for ranks in lattice]
    useful = [k for k, point in enumerate(points) if isinstance(point, Candidate)]
    chosen = [lattice[k] for k in useful]
    decomposition = decompositions.get(bare.decomposition)
    errors = decompositions.errors(decomposition, weight, bare.site.axes, metric, chosen, bare.variant)
    for k, error in zip(useful, errors, strict=True):
        point = points[k]
        assert isinstance(point, Candidate)
        points[k] = replace(point, error=float(f"{error:.6g}"))
    return points


def _executed(unit: Unit, point: Candidate, work: Work) -> Candidate | Decline:
    """The point as it runs: with its factors, where that takes fewer multiply-adds than dense; else, for formats that
    are for storage, with the weight that they build when the model is loaded.

    Declined where it does not cost less than dense, or the door cannot write it.
    """
    site, full = point.site, point.dense_cost
    reason = Decline("")
    for execution in ("factored", "stored") if decompositions.get(point.decomposition).storage else ("factored",):
        candidate = replace(point, execution=execution)
        layout, block = lowered(unit.target, candidate)
        if isinstance(block, Decline):
            reason = block
            continue
        unable = unit.program.declines(site, block)
        if unable is not None:
            reason = Decline(unable)
            continue
        cost = block_cost(site, layout, block, work.rows, work.ratios)
        over = _over(cost, full, execution)
        if over is None:
            return replace(candidate, cost=cost)
        ranks = " ".join(f"{axis}={rank}" for axis, rank in point.ranks)
        reason = Decline(f"at {ranks} it takes {over}")
    return reason


def _over(cost: Cost, full: Cost, execution: str) -> str | None:
    """In what a candidate is no gain, with the numbers; multiply-adds may equal those of dense where dense runs."""
    for quantity in QUANTITIES:
        new, old = getattr(cost, quantity), getattr(full, quantity)
        equal = old == 0 or (execution != "factored" and quantity == "macs")
        if not (new < old or (equal and new <= old)):
            return f"{new / max(old, 1):.3g} of the {quantity} of dense"
    return None


def useful(options: Sequence[Candidate], more: Sequence[str] = ()) -> list[Candidate]:
    """Without those that another one beats in error, and in every quantity (and ``more`` of them), or equals in all
    (the first one stays). In rising order of parameters.
    """
    kept: list[Candidate] = []
    for option in options:
        if not any(_beats(other, option, (*QUANTITIES, *more)) for other in kept):
            kept.append(option)
    return kept


def _beats(other: Candidate, option: Candidate, quantities: Sequence[str]) -> bool:
    return other.error <= option.error and all(
        getattr(other.cost, quantity) <= getattr(option.cost, quantity) for quantity in quantities
    )
