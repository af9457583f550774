"""calibrate: second moments of the sites' inputs, and how much each site's error moves the output."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdc.decompositions import bias_shift, optimum
from tdc.errors import CalibrationError, OptionError
from tdc.frontends.program import Change, head, is_usable
from tdc.ir import Hidden, Metric, Remark, Site
from tdc.memory import give_back
from tdc.progress import track
from tdc.statistics import (
    WIDEST,
    Collector,
    Gradients,
    Moments,
    SiteStatistics,
    Statistics,
    divergence,
)

from ._backwards import Anchors, Backwards, stored_moment
from ._hidden import eliminated, met_together, narrowed, sites_of, widened
from ._split_half import split_half
from .base import Pass, Unit
from .propose_layouts import SMALL_ERROR

__all__ = ["Calibrate"]

PROBE_ERRORS = (3e-5, 3e-4, 3e-3, SMALL_ERROR, 0.3)
"""Relative squared errors given to one site at a time."""
_STEEP = 2.0
"""How much the sensitivity changes between two probes at which one more is made between them."""
_MOST = 8
"""How many probes a site gets at most."""
HIDDEN_ERRORS = (3e-3, SMALL_ERROR)
"""The same for leaving out hidden units."""
_HIDDEN_STEPS = 64
PROBE_EXAMPLES = 8
_MANY = 64
"""Sites from which on not every one is probed at all errors."""
_FULLY = 24
"""How many are, then, about."""
_FEW_ROWS = 20
_OPTIMISM = 1.1
"""How much larger an error may be on the half of the data that a fit has not seen."""


@dataclass(frozen=True)
class Calibrate(Pass):
    """Runs the dense model on the calibration batches, unless the unit has statistics or needs none.

    For each site: ``S = E[x x^T]`` and ``E[x]`` of its input (of a convolution, of the patches under its window), and
    where the door can run backwards ``G = E[g g^T]`` of the gradients of its output (see :class:`tdc.statistics.Probe`)
    and S and the mean with each row at its importance, ``||g||^2`` (:meth:`tdc.statistics.Gradients.importance`), in
    one run over all batches. Then the sensitivity, by forward runs only. The site's weight alone is replaced by its
    low-rank optimum of relative squared error e near PROBE_ERRORS in the metric, and ``sensitivity =
    divergence(outputs) / e`` (see :func:`tdc.statistics.divergence`) on the probe batches: the given ones, or the first
    eight examples of the first calibration batch. One error is not enough: the last direction of a classifier moves all
    logits together, which changes nothing, and the others everything; and what goes at the small errors of most layers
    of a good plan is what the output hardly looks at: there the sensitivity is up to a hundred times lower than at
    0.03. Where it changes most from one probe to the next there are more, eight at most. Of more than 64 sites 24 are
    probed at all errors, and the others at 0.03. Uniform weights are worse than no allocation. Of hidden units that a
    site reads so many are left out that its error is near 3e-3 and 0.03 (:func:`probed_hidden`).
    """

    name = "calibrate"

    def run(self, unit: Unit) -> Unit:
        if unit.calibration is not None and unit.sites:
            anchors = Anchors()
            if unit.statistics is None:
                unit = unit.having(statistics=_gather(unit, anchors))
                give_back()
            else:
                anchors.read(unit)
            unit = unit.having(anchors=tuple(anchors.batches), importance=tuple(anchors.importance))
            unit = unit.remarking(Remark("", self.name, anchors.remark)) if anchors.full else unit
        if unit.statistics is None:
            if unit.options.metric in ("input", "fisher") and unit.plan is None:
                raise OptionError(f"metric={unit.options.metric!r} needs calibration= or statistics=")
            return unit
        if unit.options.metric == "fisher" and unit.plan is None and not unit.statistics.gradients:
            reasons = "; ".join(r.reason for r in unit.statistics.remarks if "gradients" in r.reason)
            raise OptionError(
                f"metric='fisher' cannot be had: {reasons or 'these statistics have no output gradients'}"
            )
        return _covered(unit.remarking(*unit.statistics.remarks))


def _covered(unit: Unit) -> Unit:
    """The unit with only those sites that its statistics know, as they say that these hang together."""
    assert unit.statistics is not None
    known = unit.statistics.of(unit.sites)
    if unit.sites and not known:
        raise CalibrationError("the statistics are of another model: they fit none of the sites of this one")
    remarks = [
        Remark(site.name, "calibrate", "not covered by the statistics: stays dense")
        for site in unit.sites
        if site.order not in known
    ]
    return unit.having(sites=met_together(unit.sites, known)).remarking(*remarks)


def _gather(unit: Unit, anchors: Anchors) -> Statistics:
    collector, first, batches, backwards = _observe(unit, anchors)
    seen = [site for site in unit.sites if site.order in collector.group]
    remarks = [
        Remark(site.name, "calibrate", "the calibration data never reaches it")
        for site in unit.sites
        if site not in seen
    ]
    groups = sorted({collector.group[site.order] for site in seen})
    sums = [collector.moments[group] for group in groups]
    place = {site.order: groups.index(collector.group[site.order]) for site in seen}
    if collector.padding:
        reason = f"{collector.padding} positions are padding (attention_mask is 0): they count nowhere"
        remarks.append(Remark("", "calibrate", reason))
    remarks += _doubts(seen, sums, place)
    remarks += _too_few(unit, seen, {site.order: sums[place[site.order]] for site in seen})
    if backwards.failed:
        remarks.append(
            Remark("", "calibrate", f"no output gradients, the metric is that of the inputs: {backwards.failed}")
        )
    stored = [stored_moment(sums[k], _first(seen, place, k)) for k in range(len(sums))]
    moments, means = tuple(moment for moment, _ in stored), tuple(mean for _, mean in stored)
    probe = list(unit.program.batches(unit.probe)) if unit.probe is not None else []
    entries = tuple(_entry(site, place[site.order], sums[place[site.order]], collector) for site in seen)
    if not backwards.failed:
        entries, moments, means = _with_importance(entries, sums, moments, means)
    entries, gradients = backwards.kept(entries)
    gathered = Statistics(entries, moments, means, batches, tuple(remarks), gradients)
    probe = probe or _short(unit, first)
    with unit.program.remembering(probe):
        probing = Probing.of(unit, probe, backwards.logits)
        probes, around = _probed(unit, gathered, probing), probed_hidden(unit, gathered, probing)
    weights = [next((value for _, value in own if value > 0), 0.0) for own in probes]
    silent = [entry.site for entry, weight in zip(entries, weights, strict=True) if weight == 0]
    entries = tuple(
        replace(entry, sensitivity=weight, probes=own if weight else ())
        for entry, weight, own in zip(entries, weights, probes, strict=True)
    )
    usual = statistics.median([e.sensitivity_at(SMALL_ERROR) for e in entries if e.sensitivity > 0] or [1.0])
    entries = tuple(replace(entry, sensitivity=entry.sensitivity or usual) for entry in entries)
    if silent:
        reason = f"{len(silent)} site(s) do not change the outputs on the probe batches: taken as of median sensitivity"
        remarks.append(Remark(silent[0].name if len(silent) == 1 else "", "calibrate", reason))
    entries = tuple(replace(entry, hidden=around.get(entry.site.order, ())) for entry in entries)
    return replace(gathered, sites=entries, remarks=tuple(remarks), importance=anchors.kept(unit, entries))


def _first(seen: Sequence[Site], place: Mapping[int, int], k: int) -> Site:
    return next(site for site in seen if place[site.order] == k)


def _with_importance(
    entries: Sequence[SiteStatistics], sums: Sequence[Moments], moments: Sequence[Tensor], means: Sequence[Tensor]
) -> tuple[tuple[SiteStatistics, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The entries with the places of their moments by importance, which stand behind the others."""
    moments, means, places = list(moments), list(means), {}
    for k, own in enumerate(sums):
        if own.important is not None and own.important.mass > 0:
            first = next(entry.site for entry in entries if entry.moment == k)
            places[k] = (len(moments), own.important.effective_rows)
            moment, mean = stored_moment(own.important, first)
            moments.append(moment)
            means.append(mean)
    changed = tuple(replace(entry, important=places.get(entry.moment)) for entry in entries)
    return changed, tuple(moments), tuple(means)


def _entry(site: Site, place: int, sums: Moments, collector: Collector) -> SiteStatistics:
    lengths = tuple((axis, *pair) for axis, pair in collector.lengths.get(site.order, {}).items())
    side = "input" if sums.weight is None else "output"
    return SiteStatistics(site, place, sums.rows, 1.0, side, sums.seen, lengths)


def _observe(unit: Unit, anchors: Anchors) -> tuple[Collector, Any, int, Backwards]:
    """Sums over all batches, the first batch with entries that are all finite, how many batches there were, and the
    output gradients.
    """
    backwards, first, count = Backwards(unit, Gradients()), None, 0
    collector = Collector(unit.program.weight, backwards.importance)
    try:
        length = len(unit.calibration)
    except (TypeError, NotImplementedError):  # onnxruntime's CalibrationDataReader has a length that raises
        length = None
    batches = unit.program.batches(unit.calibration)
    for batch in track(batches, "calibrating", total=length, show=unit.options.progress):
        usable = is_usable(batch)
        collector.begin_batch(unit.program.unpadded(batch))
        first = batch if first is None and usable else first
        if not (usable and backwards.add(batch, collector.tap)):
            unit.program.observe(batch, unit.sites, collector.tap)
        collector.end_batch()
        anchors.add(batch, backwards.of_batch())
        backwards.gradients.norms.clear()
        give_back()
        count += 1
    if count == 0:
        raise CalibrationError("the calibration data is empty: it gave no batch")
    if first is None:
        raise CalibrationError("no calibration batch has entries that are all finite")
    if any(sums.rows == 0 for sums in collector.moments):
        raise CalibrationError("the calibration data gives no finite activation row for some site")
    return collector, first, count, backwards


def _doubts(seen: Sequence[Site], sums: Sequence[Moments], place: Mapping[int, int]) -> list[Remark]:
    """What makes the statistics weak: rows that were left out, and fewer rows than 20 times the width."""
    remarks = []
    if dropped := sum(s.dropped for s in sums):
        remarks.append(Remark("", "calibrate", f"{dropped} activation rows with NaN or infinity were left out"))
    wide = [site for site in seen if sums[place[site.order]].weight is not None]
    for site in wide:
        reason = (
            f"{site.matrix[2]} inputs per position, more than {WIDEST}: the moment of its outputs is kept, and only "
            f"what projects the outputs is fitted"
        )
        remarks.append(Remark(site.name, "calibrate", reason))
    widths = {site.order: site.matrix[1] if site in wide else site.matrix[2] for site in seen}
    few = [site for site in seen if sums[place[site.order]].rows < _FEW_ROWS * widths[site.order]]
    if few:
        worst = min(few, key=lambda site: sums[place[site.order]].rows / widths[site.order])
        rows, width = sums[place[worst.order]].rows, widths[worst.order]
        reason = (
            f"{len(few)} site(s) with fewer than {_FEW_ROWS} calibration rows per input (least: {worst.name}, {rows} "
            f"rows for {width} inputs): errors on other data will be higher than predicted"
        )
        remarks.append(Remark("", "calibrate", reason))
    return remarks


def _too_few(unit: Unit, seen: Sequence[Site], sums: Mapping[int, Moments]) -> list[Remark]:
    """What the two halves of the batches say of each other's fits."""
    found = split_half(unit.program, seen, sums)
    over = {order: ratio for order, ratio in found.items() if ratio > _OPTIMISM}
    if not over:
        return []
    worst = max(over, key=over.__getitem__)
    name = next(site.name for site in seen if site.order == worst)
    reason = (
        f"too little calibration data for {len(over)} of the {len(found)} site(s) with the fewest rows: fitted to half "
        f"of the batches, the error on the other half is up to {over[worst]:.3g} times as large ({name})"
    )
    return [Remark("", "calibrate", reason)]


def _short(unit: Unit, batch: Any) -> list[Any]:
    """The first examples of a batch; the whole batch where the model wants just that size."""
    short = head(batch, PROBE_EXAMPLES)
    try:
        unit.program.outputs(short, {})
    except CalibrationError:
        return [batch]
    return [short]


@dataclass(frozen=True)
class Probing:
    """Batches for forward runs, with the outputs of the dense model; ``logits``: the name of those among them."""

    unit: Unit
    batches: Sequence[Any]
    references: Sequence[Mapping[str, Tensor]]
    logits: str | None

    @classmethod
    def of(cls, unit: Unit, batches: Sequence[Any], logits: str | None) -> Probing:
        return cls(unit, batches, [unit.outputs(batch) for batch in batches], logits)

    def sensitivity(self, site: Site, weight: Tensor, moved: Tensor, metric: Metric, error: float) -> float:
        """The mean divergence of the outputs with another weight (both float64) in one site, over its relative squared
        error.
        """
        new = Change(moved.to(getattr(torch, site.dtype)), bias_shift(weight - moved, metric))
        changes = [
            divergence(reference, self.unit.outputs(batch, {site.order: new}), self.logits)
            for batch, reference in zip(self.batches, self.references, strict=True)
        ]
        change = sum(changes) / len(changes)
        if not math.isfinite(change):
            raise CalibrationError(f"the model's outputs on the probe batches are not finite (probing {site.name})")
        return float(f"{max(change, 0.0) / error:.6g}")


def probed_hidden(unit: Unit, gathered: Statistics, probing: Probing) -> dict[int, tuple[tuple[float, float], ...]]:
    """For each site that reads hidden units, by its order, (error, ``divergence / error``) with so few of these that
    its error is near HIDDEN_ERRORS.

    What is left out was chosen on the calibration data, and is missed more on other data than the directions that low
    rank leaves out: that is in these figures, where the probe batches are such data.
    """
    here, known = {site.order: site for site in unit.sites}, gathered.of(unit.sites)
    found: dict[int, tuple[tuple[float, float], ...]] = {}
    readers = [site for site in unit.sites if sites_of(site, here) is not None and site.order in known]
    for site in track(readers, "probing hidden units", show=unit.options.progress):
        weight = unit.program.weight(site).double()
        metric = gathered.metric(known[site.order], weight, gathered.metric_name)
        if metric.second_moment is None:
            continue
        units = weight.shape[1]
        step = max(1, units // _HIDDEN_STEPS)
        best = eliminated(weight, metric, step, max(step, units // 4))
        own: dict[float, float] = {}
        for wanted in HIDDEN_ERRORS:
            width = next((k for k, error in best.errors.items() if error >= wanted), min(best.errors, default=0))
            error = best.errors.get(width, 0.0)
            if 1e-9 < error <= 1 and error not in own:
                kept, around = best.kept(width), Hidden(0, "i", width)
                small, _ = narrowed(around, kept, weight, metric)
                own[error] = probing.sensitivity(site, weight, widened(around, kept, small, weight), metric, error)
        found[site.order] = tuple(sorted(own.items()))
    return found


def _probed(unit: Unit, gathered: Statistics, probing: Probing) -> list[tuple[tuple[float, float], ...]]:
    """For each site (error, ``divergence / error``), with it alone replaced by its optimum of relative squared errors
    near PROBE_ERRORS; () for one without any error. Of many sites most are probed at one error, see :func:`_completed`.
    """
    step = math.ceil(len(gathered.sites) / _FULLY) if len(gathered.sites) > _MANY else 1
    found = []
    for k, entry in enumerate(track(gathered.sites, "probing sites", show=unit.options.progress)):
        site = entry.site
        double = unit.program.weight(site).double()
        metric = gathered.metric(entry, double, gathered.metric_name)
        best = optimum(double, metric, site.matrix[0])
        own: dict[int, tuple[float, float]] = {}
        ranks = _probe_ranks(best.tail, PROBE_ERRORS if k % step == 0 else (SMALL_ERROR,))
        while ranks:
            for rank in ranks:
                moved, error = best.approximation(rank).reshape(double.shape), float(best.tail[rank])
                own[rank] = error, probing.sensitivity(site, double, moved, metric, error)
            ranks = _between(own, best.tail) if step == 1 and len(own) < _MOST else []
        found.append(tuple(own[rank] for rank in sorted(own, reverse=True)))
    return found if step == 1 else _completed(gathered.sites, found, step)


def _between(own: Mapping[int, tuple[float, float]], tail: Tensor) -> list[int]:
    """The rank between those two that follow each other, of all with a rank between them, whose sensitivities differ
    most, at about their geometric mean error; none if no two differ by more than ``_STEEP``.
    """
    pairs = [
        (abs(math.log(max(own[a][1], 1e-30) / max(own[b][1], 1e-30))), a, b)
        for a, b in itertools.pairwise(sorted(own))
        if b - a > 1
    ]
    steep, low, high = max(pairs, default=(0.0, 0, 0))
    if steep <= math.log(_STEEP):
        return []
    middle = math.sqrt(own[low][0] * own[high][0])
    return [min(range(low + 1, high), key=lambda rank: abs(math.log(float(tail[rank]) / middle)))]


def _completed(
    entries: Sequence[SiteStatistics], found: Sequence[tuple[tuple[float, float], ...]], step: int
) -> list[tuple[tuple[float, float], ...]]:
    """The probes of sites that were probed at one error, at the others too: the sensitivity is taken to change with the
    error as it does in the median over every ``step``-th site, which was probed at all; of weights of the same sizes
    where there are such.
    """
    curves: dict[object, list[list[float]]] = {}
    for entry, own in list(zip(entries, found, strict=True))[::step]:
        probed = replace(entry, probes=own, sensitivity=own[0][1] if own else 0.0)
        if len(own) > 1 and probed.sensitivity_at(SMALL_ERROR) > 0:
            curve = [probed.sensitivity_at(e) / probed.sensitivity_at(SMALL_ERROR) for e in PROBE_ERRORS]
            for key in (entry.site.sizes, None):
                curves.setdefault(key, []).append(curve)
    usual = {key: [statistics.median(values) for values in zip(*own, strict=True)] for key, own in curves.items()}
    completed = list(found)
    for k, (entry, own) in enumerate(zip(entries, found, strict=True)):
        curve = usual.get(entry.site.sizes, usual.get(None, []))
        if k % step and own and curve:
            pairs = zip(PROBE_ERRORS, curve, strict=True)
            completed[k] = tuple((error, float(f"{own[0][1] * value:.6g}")) for error, value in pairs)
    return completed


def _probe_ranks(tail: Tensor, errors: Sequence[float]) -> list[int]:
    """Ranks in falling order: of each of the errors the first whose error is at most that, or the last one with any
    error; none if there is none.
    """
    with_error = int((tail > 1e-12).sum())
    ranks = [min(int((tail > error).sum()), with_error - 1) for error in errors] if with_error else []
    return sorted({rank for rank in ranks if float(tail[rank]) <= 1}, reverse=True)
