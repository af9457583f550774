"""propose-layouts: for every site the layouts that could take its place, with cost and error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import DENSE, Block, Candidate, Decline, Layout, Metric, Remark, Site
from tdc.ir.block import without_gather
from tdc.planning.budget import QUANTITIES
from tdc.planning.cost import block_cost, dense_cost
from tdc.planning.path import contraction_paths
from tdc.progress import track
from tdc.statistics import SiteStatistics
from tdc.targets import Target

from .base import Pass, Unit

__all__ = ["ProposeLayouts", "Work", "lowered", "metric_name", "metric_of", "site_statistics"]


@dataclass(frozen=True)
class ProposeLayouts(Pass):
    """The dense weight always, and every point of every allowed decomposition's lattice that is smaller in the
    budget's terms.

    A point that is not smaller than dense in parameters, bytes and multiply-adds is not proposed.
    """

    name = "propose-layouts"

    def run(self, unit: Unit) -> Unit:
        chosen = _allowed(unit.options.allow)
        known = site_statistics(unit)
        proposed, remarks = {}, []
        for site in track(unit.sites, "proposing layouts", show=unit.options.progress):
            options = _candidates(unit, site, known.get(site.order), chosen)
            proposed[site.order] = options
            if len(options) == 1:
                tried = ", ".join(d.name for d in chosen) or "no decomposition"
                remarks.append(
                    Remark(site.name, self.name, f"{site.label}: {tried} has no rank that stores less than dense")
                )
        return unit.having(candidates=proposed).remarking(*remarks)


def _allowed(names: Sequence[str]) -> list[decompositions.Decomposition]:
    """Those that are named; ``all`` names every one, and nothing those that are tried by default."""
    if "all" in names:
        return [decompositions.get(name) for name in decompositions.names()]
    if names:
        return [decompositions.get(name) for name in names if name != DENSE]
    return [d for d in map(decompositions.get, decompositions.names()) if d.by_default]


def metric_of(unit: Unit, site: Site, entry: SiteStatistics | None, weight: Tensor, *, fitting: bool = True) -> Metric:
    """The metric of one site: ``input`` where the unit uses statistics and has some of this site, else ``weight``, with
    the gain of a normalisation in front folded into the weight.
    """
    if metric_name(unit) == "weight" or entry is None or unit.statistics is None:
        gain = unit.program.gain(site)
        return Metric("weight", None if gain is None else torch.diag(gain.double().square()))
    return unit.statistics.metric(entry, weight, fitting=fitting)


def metric_name(unit: Unit) -> str:
    """The metric of the unit's plan, or of its options: ``auto`` is ``input`` where there are statistics."""
    if unit.plan is not None:
        return unit.plan.metric
    if unit.options.metric == "auto":
        return "input" if unit.statistics is not None else "weight"
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


@lru_cache(maxsize=8192)
def _layout(name: str, axes: tuple[tuple[str, int], ...], ranks: tuple[tuple[str, int], ...], variant: str) -> Layout:
    return decompositions.get(name).layout(dict(axes), dict(ranks), variant)


def lowered(target: Target, candidate: Candidate) -> tuple[Layout, Block | Decline]:
    """The layout of a candidate that is not dense, and its block on the target. Raises ValueError for
    impossible ranks.
    """
    site = candidate.site
    layout = _layout(candidate.decomposition, site.sizes, candidate.ranks, candidate.variant)
    if candidate.execution == "factored":
        block = _straight(target, site, layout)
    else:
        block = target.lower_weight(site.kind, layout, site.windows, candidate.execution)
    if candidate.folded and isinstance(block, Block):
        block = without_gather(block)
    return layout, block


def _straight(target: Target, site: Site, layout: Layout) -> Block | Decline:
    try:
        paths = contraction_paths(site.kind, layout, site.windows)
    except ValueError as error:
        return Decline(str(error))
    return target.lower(site.kind, layout, paths)


def _candidates(
    unit: Unit, site: Site, entry: SiteStatistics | None, chosen: list[decompositions.Decomposition]
) -> tuple[Candidate, ...]:
    """Candidates in rising order of cost; the dense one comes last."""
    work = Work.of(unit, site, entry)
    sensitivity = entry.sensitivity if entry is not None else 1.0
    full = dense_cost(site, work.rows, work.ratios)
    dense = Candidate(site, DENSE, sensitivity=sensitivity, cost=full, dense_cost=full)
    weight = unit.program.weight(site).double()
    metric = metric_of(unit, site, entry, weight)
    options: list[Candidate] = []
    for decomposition in chosen:
        for variant in decomposition.variants(site.axes):
            if metric.output_moment is None or not decomposition.needs_input(variant):
                options += _points(unit, dense, weight, metric, decomposition, variant, work)
    options.sort(key=lambda c: (c.cost.params, c.error, c.decomposition, c.variant))
    return (*_useful(options), dense)


def _points(
    unit: Unit,
    dense: Candidate,
    weight: Tensor,
    metric: Metric,
    decomposition: decompositions.Decomposition,
    variant: str,
    work: Work,
) -> list[Candidate]:
    """One variant's candidates that are smaller than dense."""
    site = dense.site
    full_rank = min(decomposition.full_ranks(site.axes, variant).values())
    step = unit.target.rank_step(full_rank) if unit.options.allocation != "uniform" else 1
    lattice = decomposition.rank_lattice(site.axes, step, variant)
    errors = decomposition.errors(weight, site.axes, metric, lattice, variant)
    found = []
    for ranks, error in zip(lattice, errors, strict=True):
        rounded = float(f"{error:.6g}")
        point = replace(
            dense, decomposition=decomposition.name, variant=variant, ranks=tuple(ranks.items()), error=rounded
        )
        taken = _executed(unit, point, work)
        if taken is not None:
            found.append(taken)
    return found


def _executed(unit: Unit, point: Candidate, work: Work) -> Candidate | None:
    """The point as it runs: with its factors, where that takes fewer multiply-adds than dense; else, for formats that
    are for storage, with the weight that they build when the model is loaded. None where it stores no less than dense,
    or the door cannot write it.
    """
    site, full = point.site, point.dense_cost
    for execution in ("factored", "stored") if decompositions.get(point.decomposition).storage else ("factored",):
        candidate = replace(point, execution=execution)
        layout, block = lowered(unit.target, candidate)
        if isinstance(block, Decline) or unit.program.declines(site, block) is not None:
            continue
        cost = block_cost(site, layout, block, work.rows, work.ratios)
        smaller = {q: getattr(cost, q) < getattr(full, q) or getattr(full, q) == 0 for q in QUANTITIES}
        if execution != "factored":
            smaller["macs"] = cost.macs <= full.macs
        if all(smaller.values()):
            return replace(candidate, cost=cost)
    return None


def _useful(options: list[Candidate]) -> list[Candidate]:
    """Without those that another one beats in error, and in every quantity, or equals in all (the first one stays)."""
    kept: list[Candidate] = []
    for option in options:
        if not any(_beats(other, option) for other in kept):
            kept.append(option)
    return kept


def _beats(other: Candidate, option: Candidate) -> bool:
    return other.error <= option.error and all(
        getattr(other.cost, quantity) <= getattr(option.cost, quantity) for quantity in QUANTITIES
    )
