"""time-layouts: how long candidates take on this machine, where the budget names time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tdc.errors import BudgetError
from tdc.frontends.program import Kernel, Stopwatch
from tdc.ir import Block, Candidate, Remark, Site
from tdc.kernels import Match, match
from tdc.planning.budget import Budget
from tdc.progress import track

from .base import Members, Pass, Unit
from .propose_layouts import lowered, useful

__all__ = ["TimeLayouts"]

_POINTS = 5
"""Candidates of one format that are measured at a site; times of the others are between them."""
_GAIN = 0.98
"""A candidate must take less than this fraction of the dense time."""


@dataclass(frozen=True)
class TimeLayouts(Pass):
    """Measures the dense layers and, of every format, five candidates, on activations as the example gives them and
    with weights that the caches hold no better than in the model; the times of the others are taken for piecewise
    linear in the multiply-adds. Candidates that take longer than the dense layer are left out. Sites that are alike are
    measured once. Of several examples (``unit.workload``) the times are added, each as often as it is run. Sites with
    hidden units in common are timed one by one, with as many of these as the candidate keeps. Groups that share factors
    are not proposed under such a budget.
    """

    name = "time-layouts"

    def run(self, unit: Unit) -> Unit:
        if unit.options.budget is None or not Budget.parse(unit.options.budget).timed:
            return unit
        watch = _watch(unit)
        known: dict[object, dict[str, _Curve]] = {}
        timed, remarks, hidden = {}, [], _around_hidden(unit)
        beside: dict[Candidate, Candidate] = {}
        for site in track(unit.sites, "timing layouts", show=unit.options.progress):
            options, around = unit.candidates[site.order], hidden.get(site.order, ())
            key = (watch.key(site), frozenset(map(_format, around)))
            new = key not in known
            if new:
                known[key] = _curves(unit, watch, (*around, *options))
            dense = known[key][_format(options[-1])].seconds[0]
            beside |= {c: _timed(c, known[key], dense) for c in around}
            found = [_timed(c, known[key], dense) for c in options]
            whole = found[-1]
            faster = [c for c in found[:-1] if c.cost.seconds < _GAIN * whole.cost.seconds]
            slower = [c for c in found[:-1] if c.cost.seconds >= _GAIN * whole.cost.seconds]
            if faster and slower and new:
                remarks.append(Remark(site.name, self.name, _left_out(slower, whole)))
            timed[site.order] = (*useful(faster, ("seconds",)), whole)
            if len(options) > 1 and not faster:
                best = min(found[:-1], key=lambda c: c.cost.seconds)
                share = best.cost.seconds / whole.cost.seconds
                reason = f"stays dense: the fastest layout, {_words(best)}, takes {share:.2f} of the dense time"
                remarks.append(Remark(site.name, self.name, reason))
        groups = {
            group: tuple(made for members in own if _is_faster(made := tuple(beside[c] for c in members)))
            for group, own in unit.joint.items()
            if own[0][0].hidden is not None
        }
        joint = {group: own for group, own in groups.items() if own}
        return unit.having(candidates=timed, joint=joint, timing=watch.model()).remarking(*remarks)


def _around_hidden(unit: Unit) -> dict[int, tuple[Candidate, ...]]:
    """``site.order`` -> what a site could be beside others that have hidden units in common with it."""
    found: dict[int, dict[Candidate, None]] = {}
    for options in unit.joint.values():
        for candidate in (c for members in options for c in members if c.hidden is not None):
            found.setdefault(candidate.site.order, {})[candidate] = None
    return {order: tuple(own) for order, own in found.items()}


def _is_faster(members: Members) -> bool:
    """Whether sites take less time together than dense, beyond doubt."""
    return sum(c.cost.seconds for c in members) < _GAIN * sum(c.dense_cost.seconds for c in members)


@dataclass(frozen=True)
class _Mix:
    """Several examples, each run so often."""

    parts: Sequence[tuple[Stopwatch, float]]

    def model(self) -> tuple[float, float]:
        each = [(weight, *watch.model()) for watch, weight in self.parts]
        whole = sum(weight * seconds for weight, seconds, _ in each)
        return whole, sum(weight * seconds * part for weight, seconds, part in each) / whole

    def key(self, site: Site) -> object:
        return tuple(watch.key(site) for watch, _ in self.parts)

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[Kernel | None] = ()) -> list[float]:
        each = [[weight * seconds for seconds in watch.site(site, blocks, kernels)] for watch, weight in self.parts]
        return [sum(column) for column in zip(*each, strict=True)]


def _watch(unit: Unit) -> Stopwatch:
    """Raises BudgetError where nothing can be timed."""
    parts = []
    for batch, weight in unit.workload or ((None, 1.0),):
        watch = unit.program.stopwatch(unit.sites, batch)
        if isinstance(watch, str):
            raise BudgetError(f"the budget {unit.options.budget} names time: {watch}")
        parts.append((watch, weight))
    return _Mix(parts) if unit.workload else parts[0][0]


def _words(candidate: Candidate) -> str:
    ranks = " ".join(f"{axis}={rank}" for axis, rank in candidate.ranks)
    return f"{candidate.decomposition}{'/' * bool(candidate.variant)}{candidate.variant} at {ranks}"


def _left_out(slower: Sequence[Candidate], dense: Candidate) -> str:
    """Of each format the layout of fewest multiply-adds that gains nothing, with its time."""
    least: dict[str, Candidate] = {}
    for candidate in sorted(slower, key=lambda c: c.cost.macs):
        least.setdefault(_format(candidate), candidate)
    told = [f"{_words(c)} ({c.cost.seconds / dense.cost.seconds:.2f} of its time)" for c in least.values()]
    return (
        f"no faster than the dense layer ({1e6 * dense.cost.seconds:.3g} us), here and in layers like it, and "
        f"left out, from these on: {', '.join(told)}"
    )


@dataclass(frozen=True)
class _Curve:
    """Multiply-adds, in rising order, and seconds."""

    macs: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, macs: float) -> float:
        return float(np.interp(macs, self.macs, self.seconds))


def _format(candidate: Candidate) -> str:
    whole = f"{candidate.decomposition}/{candidate.variant}/{candidate.execution}"
    return f"{whole} of hidden units" if candidate.hidden is not None else whole


def _curves(unit: Unit, watch: Stopwatch, options: Sequence[Candidate]) -> dict[str, _Curve]:
    """The curve of each format of one site; of the dense layer one point."""
    chosen: list[tuple[Candidate, Block]] = []
    formats: dict[str, list[Candidate]] = {}
    for candidate in options[:-1]:
        formats.setdefault(_format(candidate), []).append(candidate)
    for own in formats.values():
        own.sort(key=lambda c: c.cost.macs)
        places = sorted({round(p) for p in np.linspace(0, len(own) - 1, min(_POINTS, len(own)))})
        for place in places:
            block = lowered(unit.target, own[place])[1]
            assert isinstance(block, Block)
            chosen.append((own[place], block))
    blocks = [block for _, block in chosen]
    seconds = watch.site(options[-1].site, blocks, [_kernel(block) for block in blocks])
    points: dict[str, list[tuple[float, float]]] = {_format(options[-1]): [(options[-1].cost.macs, seconds[0])]}
    for (candidate, _), time in zip(chosen, seconds[1:], strict=True):
        points.setdefault(_format(candidate), []).append((candidate.cost.macs, time))
    return {name: _Curve(*zip(*sorted(own), strict=True)) for name, own in points.items()}


def _kernel(block: Block) -> Kernel | None:
    """What runs the block on this machine beside stock operators."""
    found = match(block)
    return found.run if isinstance(found, Match) else None


def _timed(candidate: Candidate, curves: dict[str, _Curve], dense: float) -> Candidate:
    seconds = curves[_format(candidate)].at(candidate.cost.macs)
    new = replace(candidate.cost, seconds=float(f"{seconds:.4g}"))
    return replace(candidate, cost=new, dense_cost=replace(candidate.dense_cost, seconds=float(f"{dense:.4g}")))
