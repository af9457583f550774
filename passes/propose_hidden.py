"""propose-hidden: fewer hidden units between layers, and layouts of the smaller weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from torch import Tensor

from tdc import decompositions
from tdc.ir import Block, Candidate, Hidden, Metric, Site
from tdc.planning.cost import block_cost
from tdc.progress import track
from tdc.statistics import SiteStatistics

from ._hidden import Elimination, eliminated, hidden_step, narrowed, sites_of
from .base import Members, Pass, Unit
from .propose_layouts import Work, allowed, at_least, lowered, metric_name, metric_of, site_statistics, useful

__all__ = ["ProposeHidden"]

_LEAST = 0.125
"""Of the units that are kept at least."""
_MIXED = (0.85, 0.7, 0.5, 0.3)
"""Parts of the units at which the smaller weights are given other layouts too."""
_PRICES = 16
_BEYOND = 1.6
"""By how much more than low rank an error of leaving out units counts where that was not probed: it grows more on other
data than those that chose the units (SmolLM2, 24,576 tokens: by 1.35 to 2.1 times in place of 1.16 to 1.47)."""


@dataclass(frozen=True)
class ProposeHidden(Pass):
    """For each group of linear sites with hidden units between them (the layers of an MLP, gated or not): fewer of
    these units (the decompositions with ``between_layers``), as smaller dense weights and in the allowed layouts of
    these.

    The error of the site that reads the units is that of leaving some out and that of its layout together; which are
    left out is decided by :func:`._hidden.eliminated`. Needs statistics of the units.
    """

    name = "propose-hidden"

    def run(self, unit: Unit) -> Unit:
        chosen = allowed(unit.options.allow)
        between = [decomposition.name for decomposition in chosen if decomposition.between_layers]
        if unit.options.allocation != "lagrangian" or metric_name(unit) == "weight" or not between:
            return unit
        known, here = site_statistics(unit), {site.order: site for site in unit.sites}
        groups = [group for site in unit.sites if (group := sites_of(site, here)) is not None]
        found, numbers = dict(unit.joint), count(1 + max(unit.joint, default=0))
        for group in track(groups, "proposing fewer hidden units", show=unit.options.progress):
            reader = known.get(group[-1].order)
            if reader is not None and reader.side == "input":
                options = _Group(unit, group, next(numbers), known, between[0]).options(chosen)
                if options:
                    found[options[0][0].hidden.group] = options  # type: ignore[union-attr]
        return unit.having(joint=found)


@dataclass(frozen=True, eq=False)
class _Group:
    """The sites around some hidden units; the one that reads them last."""

    unit: Unit
    sites: Sequence[Site]
    number: int
    known: Mapping[int, SiteStatistics]
    name: str
    """Of the decomposition of the hidden units."""

    def options(self, chosen: Sequence[decompositions.Decomposition]) -> tuple[Members, ...]:
        """What they can do together: smaller dense weights, and then other layouts of these."""
        unit, sites = self.unit, self.sites
        weights = [unit.program.weight(site).double() for site in sites]
        metrics = [metric_of(unit, s, self.known.get(s.order), w) for s, w in zip(sites, weights, strict=True)]
        units = sites[-1].axes["i"]
        step = hidden_step(unit.target, units)
        best = eliminated(weights[-1], metrics[-1], step, step * max(1, round(_LEAST * units / step)))
        found: list[Members] = []
        for width in best.errors:
            members = tuple(self._plain(k, width, best) for k in range(len(sites)))
            if all(isinstance(member, Candidate) for member in members):
                found.append(members)  # type: ignore[arg-type]
        energies = [_energy(weight, metric) for weight, metric in zip(weights, metrics, strict=True)]
        mixed = {step * round(part * units / step) for part in _MIXED}
        for members in [m for m in found if m[0].hidden and m[0].hidden.width in mixed]:
            width = members[0].hidden.width  # type: ignore[union-attr]
            kept = best.kept(width)
            rows = [
                self._layouts(member, narrowed(member.hidden, kept, weight, metric), energy, chosen)
                for member, weight, metric, energy in zip(members, weights, metrics, energies, strict=True)
            ]
            found += [mixed for mixed in _mixed(rows) if mixed != members]
        return tuple(found)

    def _plain(self, place: int, width: int, best: Elimination) -> Candidate | None:
        """The smaller dense weight of one site; None where the target or the door cannot have it."""
        site = self.sites[place]
        axis = "i" if place == len(self.sites) - 1 else "o"
        hidden = Hidden(self.number, axis, width)
        bare = replace(self.unit.candidates[site.order][-1], decomposition=self.name, hidden=hidden)
        return self._judged(bare, best.errors[width] if axis == "i" else 0.0)

    def _judged(self, bare: Candidate, error: float) -> Candidate | None:
        site, entry = bare.site, self.known.get(bare.site.order)
        layout, block = lowered(self.unit.target, bare)
        if not isinstance(block, Block) or self.unit.program.declines(site, block) is not None:
            return None
        work = Work.of(self.unit, site, entry)
        sensitivity = bare.sensitivity
        if entry is not None:
            reads = bare.hidden is not None and bare.hidden.axis == "i"
            probes = entry.hidden if reads and any(value > 0 for _, value in entry.hidden) else entry.probes
            sensitivity = replace(entry, probes=probes).sensitivity_at(error)
            sensitivity *= _BEYOND if reads and probes is entry.probes else 1.0
        cost = block_cost(site, layout, block, work.rows, work.ratios)
        return replace(bare, error=float(f"{error:.6g}"), sensitivity=float(f"{sensitivity:.6g}"), cost=cost)

    def _layouts(
        self,
        plain: Candidate,
        small: tuple[Tensor, Metric],
        energy: float,
        chosen: Sequence[decompositions.Decomposition],
    ) -> list[Candidate]:
        """The smaller dense weight of one site, and the layouts of it that cost less; ``energy``: of the whole one."""
        axes = {**plain.site.axes, **plain.kept}
        part = _energy(*small) / energy if energy > 0 else 1.0
        found = [plain]
        for decomposition in chosen:
            for variant in decomposition.variants(axes):
                if decomposition.too_large(axes, variant) or decomposition.estimates:
                    continue
                full = decomposition.full_ranks(axes, variant)
                step = self.unit.target.rank_step(min(full.values()))
                lattice = at_least(self.unit.target, decomposition.rank_lattice(axes, step, variant), full)
                errors = decompositions.errors(decomposition, small[0], axes, small[1], lattice, variant)
                bare = replace(plain, decomposition=decomposition.name, variant=variant)
                for ranks, error in zip(lattice, errors, strict=True):
                    made = self._judged(replace(bare, ranks=tuple(ranks.items())), plain.error + part * error)
                    if made is not None and made.cost.params < plain.cost.params and made.cost.macs < plain.cost.macs:
                        found.append(made)
        return useful(sorted(found, key=lambda c: (c.cost.params, c.error)))


def _energy(weight: Tensor, metric: Metric) -> float:
    whole = decompositions.whitened(weight, metric)
    return decompositions.energy(whole.weight[None], whole.metric)


def _mixed(rows: Sequence[Sequence[Candidate]]) -> list[Members]:
    """One candidate of each site, those of least loss and price, at prices from all layouts to none."""
    slopes = sorted(
        (c.sensitivity * c.error - row[-1].sensitivity * row[-1].error) / (row[-1].cost.params - c.cost.params)
        for row in (sorted(row, key=lambda c: c.cost.params) for row in rows)
        for c in row[:-1]
        if c.cost.params < row[-1].cost.params
    )
    found: dict[Members, None] = {}
    for k in range(_PRICES if slopes else 0):
        price = slopes[k * (len(slopes) - 1) // (_PRICES - 1)]

        def priced(c: Candidate, price: float = price) -> float:
            return c.sensitivity * c.error + price * c.cost.params

        found[tuple(min(row, key=priced) for row in rows)] = None
    return list(found)
