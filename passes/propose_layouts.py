"""propose-layouts: for every site the layouts that could take its place, with cost and error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

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

__all__ = ["ProposeLayouts", "lowered", "metric_name", "metric_of", "site_statistics"]


@dataclass(frozen=True)
class ProposeLayouts(Pass):
    """The dense weight always, and every point of every allowed decomposition's lattice that is smaller in the
    budget's terms.

    A point that is not smaller than dense in parameters, bytes and multiply-adds is not proposed.
    """

    name = "propose-layouts"

    def run(self, unit: Unit) -> Unit:
        allowed = unit.options.allow or decompositions.names()
        chosen = [decompositions.get(name) for name in allowed if name != DENSE]
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


def metric_of(unit: Unit, entry: SiteStatistics | None) -> Metric:
    """The metric of one site: ``input`` where the unit uses statistics and has some of this site, else ``weight``."""
    if metric_name(unit) == "weight" or entry is None or unit.statistics is None:
        return Metric("weight")
    return Metric("input", unit.statistics.second_moment(entry))


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


@lru_cache(maxsize=8192)
def _layout(name: str, axes: tuple[tuple[str, int], ...], ranks: tuple[tuple[str, int], ...], variant: str) -> Layout:
    return decompositions.get(name).layout(dict(axes), dict(ranks), variant)


def lowered(target: Target, candidate: Candidate) -> tuple[Layout, Block | Decline]:
    """The layout of a candidate that is not dense, and its block on the target. Raises ValueError for
    impossible ranks.
    """
    site = candidate.site
    layout = _layout(candidate.decomposition, site.sizes, candidate.ranks, candidate.variant)
    block = target.lower(layout, contraction_paths(site.kind, layout))
    if candidate.folded and isinstance(block, Block):
        block = without_gather(block)
    return layout, block


def _candidates(
    unit: Unit, site: Site, entry: SiteStatistics | None, chosen: list[decompositions.Decomposition]
) -> tuple[Candidate, ...]:
    """Candidates in rising order of cost; the dense one comes last."""
    batches = unit.statistics.batches if unit.statistics is not None else 1
    rows = entry.rows / batches if entry is not None else float(site.uses)
    sensitivity = entry.sensitivity if entry is not None else 1.0
    full = dense_cost(site, rows)
    dense = Candidate(site, DENSE, sensitivity=sensitivity, cost=full, dense_cost=full)
    weight = unit.program.weight(site).double()
    metric = metric_of(unit, entry)
    step = unit.target.rank_step(site.axes) if unit.options.allocation != "uniform" else 1
    options = []
    for decomposition in chosen:
        if site.kind not in decomposition.kinds:
            continue
        lattice = decomposition.rank_lattice(site.axes, step)
        errors = decomposition.errors(weight, metric, lattice)
        variant = decomposition.variant(site.axes)
        for ranks, error in zip(lattice, errors, strict=True):
            rounded = float(f"{error:.6g}")
            point = Candidate(site, decomposition.name, variant, tuple(ranks.items()), rounded, sensitivity, full, full)
            layout, block = lowered(unit.target, point)
            if isinstance(block, Decline):
                continue
            cost = block_cost(site, layout, block, rows)
            if all(getattr(cost, q) < getattr(full, q) or getattr(full, q) == 0 for q in QUANTITIES):
                fields = (site, decomposition.name, variant, point.ranks, rounded, sensitivity, cost, full)
                options.append(Candidate(*fields))
    options.sort(key=lambda c: (c.cost.params, c.error, c.decomposition))
    return (*options, dense)
