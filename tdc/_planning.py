"""Deciding what happens to the weights of captured graphs, and fitting again when they have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from . import targets
from ._common import realized, reported
from ._settings import Settings
from .errors import PlanError
from .frontends.fx.captured import Bound, undisturbed
from .frontends.fx.program import Batch, FxProgram
from .frontends.fx.rewrite import Cut
from .ir import Cost, Plan, Site, assign
from .options import Options
from .passes.base import Unit
from .passes.fit_factors import FitFactors
from .passes.propose_joint import members_of
from .report import Report
from .statistics import Statistics

__all__ = ["Outcome", "Stamp", "decide", "refit", "stamp_of"]

Stamp = tuple[int, int]


def stamp_of(tensor: Tensor) -> Stamp:
    """Version and address: one of them differs after whatever PyTorch counts as a change of a tensor."""
    return (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())


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
    pause: Callable[[], None] = lambda: None,
) -> Outcome:
    """Plan and fit for the first graph; batches may run through the others. Raises what the passes raise."""
    program = FxProgram(bounds, example, pause=pause)
    with undisturbed():
        sites = program.sites()[0]
        plan = None if settings.plan is None else _part_of(settings.plan, sites)
        options = replace(settings.options, exclude=_fitting(settings.options.exclude, sites))
        unit = Unit(program, targets.get(options.target), options, calibration, settings.probe, settings.statistics)
        return _outcome(unit, program, plan, example)


def refit(bound: Bound, settings: Settings, old: Outcome) -> Outcome:
    """The same decisions for weights that have changed."""
    program = FxProgram([bound])
    with undisturbed():
        for key in [key for key, tensors in _origins.items() if {id(t) for t in bound.tensors.values()} & tensors]:
            _forget(key)  # a change that PyTorch does not count leaves the key as it was
        now = {site.order: site for site in program.sites()[0]}
        choices = tuple(replace(c, site=now[c.site.order]) for c in old.plan.choices if c.site.order in now)
        known = None if old.statistics is None else _renamed(old.statistics, old.sites, now)
        options = replace(settings.options, budget=None, allocation=Options.allocation, exclude=())
        unit = Unit(program, targets.get(options.target), options, statistics=known)
        new = _outcome(unit, program, replace(old.plan, choices=choices), None)
    before, after = old.report.model_before, old.report.model_after
    return replace(new, report=replace(new.report, model_before=before, model_after=after))


def _outcome(unit: Unit, program: FxProgram, plan: Plan | None, example: Batch | None) -> Outcome:
    unit = realized(unit, plan, lambda step: _CachedFit() if isinstance(step, FitFactors) else step)
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


_Key = tuple[Any, ...]
_fitted: dict[_Key, Mapping[str, Tensor]] = {}
_origins: dict[_Key, set[int]] = {}


def _forget(key: _Key) -> None:
    _fitted.pop(key, None)
    _origins.pop(key, None)


class _CachedFit(FitFactors):
    """Fits no weight twice in one process: graphs that share a weight, and compilations that are repeated, share its
    factors. Entries go with their weights.
    """

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        own = {c.site.order: self._key(unit, c) for c in unit.plan.choices if not c.is_dense}
        groups = members_of(unit.plan.choices)
        beside = {c.site.order: [own[m.site.order] for m in members] for members in groups.values() for c in members}
        keys = {order: (key, *beside.get(order, ())) for order, key in own.items()}
        known = {order: _fitted[key] for order, key in keys.items() if key in _fitted}
        rest = tuple(c for c in unit.plan.choices if c.site.order not in known)
        done = super().run(unit.having(plan=replace(unit.plan, choices=rest)))
        assert done.plan is not None
        for order, factors in done.factors.items():
            self._keep(unit, order, keys[order], factors)
        decided = {c.site.order: c for c in (*unit.plan.choices, *done.plan.choices)}
        choices = tuple(decided[c.site.order] for c in unit.plan.choices)
        return done.having(plan=replace(done.plan, choices=choices), factors={**known, **done.factors})

    def _key(self, unit: Unit, choice: Any) -> _Key:
        assert isinstance(unit.program, FxProgram)
        origins = unit.program.origins(choice.site)
        digest = unit.statistics.digest if unit.statistics is not None else ""
        tensors = tuple((id(t), *stamp_of(t)) for t in origins)
        metric = unit.plan.metric if unit.plan is not None else ""
        return (*tensors, choice.decomposition, choice.variant, choice.ranks, choice.site.attributes, metric, digest)

    def _keep(self, unit: Unit, order: int, key: _Key, factors: Mapping[str, Tensor]) -> None:
        site = next(site for site in unit.sites if site.order == order)
        assert isinstance(unit.program, FxProgram)
        _fitted[key] = dict(factors)
        _origins[key] = {id(tensor) for tensor in unit.program.origins(site)}
        for tensor in unit.program.origins(site):
            weakref.finalize(tensor, _forget, key).atexit = False
