"""Deciding what happens to the weights of captured graphs, and fitting again when they have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import targets
from ._common import realized, reported
from ._fits import CachedFit, forget_fits
from ._settings import Settings
from .errors import PlanError
from .frontends.fx.captured import Bound, undisturbed
from .frontends.fx.emit import Kernels
from .frontends.fx.program import Batch, FxProgram
from .frontends.fx.rewrite import Cut
from .ir import Cost, Plan, Site, assign
from .options import Options
from .passes.base import Unit
from .passes.fit_factors import FitFactors
from .report import Report
from .statistics import Statistics
from .targets import Target

__all__ = ["Outcome", "decide", "refit"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was decided, and everything that another graph with the same weights needs to follow."""

    plan: Plan
    statistics: Statistics | None
    sites: tuple[Site, ...]
    cuts: Mapping[int, Cut]
    report: Report


def decide(
    bounds: Sequence[Bound],
    settings: Settings,
    calibration: Any,
    example: Batch | None,
    kernels: Kernels | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Outcome:
    """Plan and fit for the first graph; batches may run through the others. ``kernels``: what the graphs get, and
    what budgets of time count. Raises what the passes raise.
    """
    program = FxProgram(bounds, example, kernels=kernels, pause=pause)
    with undisturbed():
        sites = program.sites()[0]
        plan = None if settings.plan is None else _part_of(settings.plan, sites)
        options = replace(settings.options, exclude=_fitting(settings.options.exclude, sites))
        unit = Unit(program, _target(settings), options, calibration, settings.probe, settings.statistics)
        return _outcome(unit, program, plan, example, settings.cache)


def _target(settings: Settings) -> Target:
    return settings.machine or targets.get(settings.options.target)


def refit(bound: Bound, settings: Settings, old: Outcome) -> Outcome:
    """The same decisions for weights that have changed."""
    program = FxProgram([bound])
    with undisturbed():
        forget_fits(bound.tensors.values())
        now = {site.order: site for site in program.sites()[0]}
        choices = tuple(replace(c, site=now[c.site.order]) for c in old.plan.choices if c.site.order in now)
        known = None if old.statistics is None else _renamed(old.statistics, old.sites, now)
        options = replace(settings.options, budget=None, allocation=Options.allocation, exclude=())
        unit = Unit(program, _target(settings), options, statistics=known)
        new = _outcome(unit, program, replace(old.plan, choices=choices), None, settings.cache)
    before, after = old.report.model_before, old.report.model_after
    return replace(new, report=replace(new.report, model_before=before, model_after=after))


def _outcome(unit: Unit, program: FxProgram, plan: Plan | None, example: Batch | None, folder: Path | None) -> Outcome:
    unit = realized(unit, plan, lambda step: CachedFit(folder) if isinstance(step, FitFactors) else step)
    assert unit.plan is not None
    costs = (program.cost(), program.cost_of(unit.result)) if example else (Cost(0, 0, 0), Cost(0, 0, 0))
    return Outcome(unit.plan, unit.statistics, unit.sites, program.cuts(), reported(unit, *costs))


def _part_of(plan: Plan, sites: Sequence[Site]) -> Plan:
    """Those choices of a plan that are for sites of one graph: a model may be cut into several.

    Raises PlanError if there is none.
    """
    found = assign([choice.site for choice in plan.choices], sites)
    choices = tuple(choice for choice, site in zip(plan.choices, found, strict=True) if site is not None)
    if not choices and sites:
        named = ", ".join(site.name for site in sites[:3])
        raise PlanError(
            f"the plan has none of the {len(sites)} site(s) of this graph ({named}): made for other weights?"
        )
    return replace(plan, choices=choices)


def _fitting(patterns: Sequence[str], sites: Sequence[Site]) -> tuple[str, ...]:
    """The patterns that fit a site of this graph; the others may be for another graph of the model."""
    names = [name for site in sites for name in site.names]
    return tuple(p for p in patterns if any(p in (n, n.rpartition(".")[0]) or fnmatchcase(n, p) for n in names))


def _renamed(statistics: Statistics, old: Sequence[Site], now: Mapping[int, Site]) -> Statistics:
    """The statistics for sites whose weights, and so their sketches, are others now."""
    known = statistics.of(old)
    return replace(
        statistics,
        sites=tuple(replace(entry, site=now[order]) for order, entry in known.items() if order in now),
    )
