"""Fitting on what the model that is already cut makes of the data, against what the dense one makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat, zip_longest
from typing import Any

import torch
from torch import Tensor

from tdc.frontends.program import Change
from tdc.ir import Candidate, Metric, Site
from tdc.statistics import SiteStatistics, divergence, logits_among, shrunk
from tdc.statistics.patches import input_rows, output_rows, window_lengths

from .base import Unit
from .propose_layouts import metric_name

__all__ = ["Anchored", "anchors_of", "held_out", "loses_more"]

_RIDGE = 1e-2
_ROUNDING = 1e3
"""Units of the last place by which inputs may differ and still be taken for the same."""
_MEMORY = 3 << 30
"""Bytes that the activations of all runs may take together, about."""
_LIVE = 4
"""Tensors of the size of a site's input that a run holds at a time, about."""

Fitted = Callable[[Sequence[Candidate], Sequence[Tensor], Sequence[Metric]], list[tuple[Mapping[str, Tensor], Tensor]]]
"""Fits a candidate, or those of a joint group, to weights (float64, canonical) in their metrics: of each the stored
factors and the weight that they rebuild, no factors where they overflow."""


def _can_anchor(entry: SiteStatistics | None, site: Site) -> bool:
    """Whether the inputs of the site are known, and it is met once."""
    return entry is not None and entry.side == "input" and site.uses == 1


def anchors_of(unit: Unit, known: Mapping[int, SiteStatistics]) -> list[Any]:
    """As many of the calibration batches as fit in the memory, two runs of each; none if it is not even two."""
    if unit.statistics is None or not unit.anchors:
        return []
    batches = unit.statistics.batches
    largest = max((e.seen / batches * e.site.matrix[2] / _taps(e.site) for e in known.values()), default=0.0)
    most = int(_MEMORY / max(1.0, 2 * 4 * _LIVE * largest))
    return list(unit.anchors[:most]) if most > 1 else []


def held_out(anchors: Sequence[Any]) -> int:
    """How many of the batches, the last ones, are kept apart to see whether anchoring helps: an eighth, at most four;
    none of fewer than four.
    """
    return min(4, max(1, len(anchors) // 8)) if len(anchors) >= 4 else 0


def loses_more(unit: Unit, first: Anchored, second: Anchored, batches: Sequence[Any]) -> tuple[float, float] | None:
    """How far the outputs move on the batches with each of two fits, if they do more so with the first one."""
    references = [unit.program.outputs(batch, {}) for batch in batches]
    logits = logits_among(references[0])
    moved = [
        sum(
            divergence(old, unit.program.outputs(b, fits.changes), logits)
            for b, old in zip(batches, references, strict=True)
        )
        for fits in (first, second)
    ]
    return (moved[0] / len(batches), moved[1] / len(batches)) if moved[0] > moved[1] else None


def _taps(site: Site) -> int:
    """Window positions of a convolution's patch: its input holds each number about once for each step of the window."""
    taps = 1
    for window in site.windows:
        taps *= max(1, window.size // window.stride)
    return taps


@dataclass
class Anchored:
    """Visits the sites in the order in which the batches reach them; fits those that are planned.

    With x the input of a site in the dense model and z that in the model that is cut up to there, the weight to fit is
    the least-squares solution of ``B z = W x``, ``B = W + W E[(x - z) z^T] (E[z z^T] + ridge)^-1``, in the
    metric of ``E[z z^T]``: so ``E ||W x - W_hat z||^2`` is least (AA-SVD, 2026); in the metric ``fisher`` with each row
    at its importance. The ridge, 1 % of the mean of the
    diagonal, draws B to W. Where a site has a bias it takes up the means, ``b + W E[x] - W_hat E[z]``. Where x and z
    are the same, up to rounding, B is W.

    Where the output is added to something, s in the dense model and t in the other (a residual connection), the sum is
    what the layers behind it read: then ``E ||(W x + s) - (W_hat z + t)||^2`` is least, with ``E[(s - t) z^T]`` added
    to ``W E[(x - z) z^T]``, and ``E[s - t]`` to what the bias takes up.
    """

    unit: Unit
    planned: Mapping[int, Candidate]
    known: Mapping[int, SiteStatistics]
    metric: Callable[[Site, Tensor], Metric]
    fitted: Fitted
    advance: Callable[[], None]
    factors: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
    overflown: set[int] = field(default_factory=set)
    anchored: set[int] = field(default_factory=set)
    changes: dict[int, Change] = field(default_factory=dict)
    """The weights that the factors rebuild, and what the biases take up."""
    _last: tuple[list[tuple[int, int]], tuple[Tensor, ...], _Pair] | None = None

    def __call__(
        self, site: Site, activations: Sequence[Tensor], beside: Sequence[Tensor | None] = ()
    ) -> Change | None:
        choice = self.planned.get(site.order)
        if choice is not None and site.order not in self.changes and site.order not in self.overflown:
            joint = choice.joint
            group = [c for c in self.planned.values() if joint and c.joint and c.joint.group == joint.group]
            self._fit(sorted(group, key=lambda c: c.site.order) or [choice], activations, beside)
        return self.changes.get(site.order)

    def _fit(
        self, choices: Sequence[Candidate], activations: Sequence[Tensor], beside: Sequence[Tensor | None]
    ) -> None:
        """One site, or those of a joint group, which read the same activations."""
        sites = [choice.site for choice in choices]
        weights = [self.unit.program.weight(site) for site in sites]
        doubles = [weight.double() for weight in weights]
        metrics = [self.metric(site, double) for site, double in zip(sites, doubles, strict=True)]
        anchor = None
        if activations and self.changes and all(_can_anchor(self.known.get(site.order), site) for site in sites):
            moments = self._moments(sites[0], activations, beside if len(sites) == 1 else ())
            anchor = moments if moments.moved else None
        if anchor is not None:
            pairs = [anchor.target(double, metric) for double, metric in zip(doubles, metrics, strict=True)]
            doubles, metrics = [double for double, _ in pairs], [metric for _, metric in pairs]
            self.anchored |= {site.order for site in sites}
        fits = self.fitted(choices, doubles, metrics)
        for site, weight, metric, (factors, rebuilt) in zip(sites, weights, metrics, fits, strict=True):
            self.advance()
            if not factors:
                self.overflown.add(site.order)
                continue
            self.factors[site.order] = factors
            shift = None if metric.mean is None else _shift(weight.double(), rebuilt, anchor, metric.mean)
            if shift is not None and anchor is not None:
                self.shifts[site.order] = shift
            self.changes[site.order] = Change(rebuilt.to(weight.dtype), shift)

    def _moments(self, site: Site, activations: Sequence[Tensor], beside: Sequence[Tensor | None]) -> _Pair:
        """Worked out once for linear sites that read the same activations one after the other."""
        by_batch = self.unit.importance if metric_name(self.unit) == "fisher" else ()
        importance = [weights.get(site.order) for weights in by_batch[: len(activations) // 2]]
        if site.kind.is_conv or any(tensor is not None for tensor in beside):
            return _Pair.of(site, activations, importance, beside)
        state = [(id(a), a._version) for a in activations]
        if self._last is None or self._last[0] != state:
            self._last = (state, tuple(activations), _Pair.of(site, activations, importance))
        return self._last[2]


def _shift(weight: Tensor, rebuilt: Tensor, moments: _Pair | None, mean: Tensor) -> Tensor:
    """``W E[x] - W_hat E[z]``."""
    if moments is None:
        return _response(weight, mean) - _response(rebuilt, mean)
    shift = _response(weight, moments.mean_x) - _response(rebuilt, moments.mean_z)
    return shift if moments.added is None else shift + moments.added[1].flatten()


def _response(weight: Tensor, mean: Tensor) -> Tensor:
    """``W m`` of a weight (g o, i, ...) for means (n) or (g, n), flat."""
    columns = mean.reshape(-1, mean.shape[-1], 1)
    return (weight.reshape(len(columns), -1, columns.shape[1]) @ columns).flatten()


def _is_row_by_row(site: Site, activation: Tensor, beside: Tensor | None) -> bool:
    """Whether there is a tensor of the size of the site's outputs."""
    groups, outputs, width = site.matrix
    if beside is None or not site.kind.is_conv:
        return beside is not None and beside.numel() * width == activation.numel() * outputs
    axes = len(site.windows)
    sizes = (groups * outputs, *(positions for *_, positions in window_lengths(site, activation)))
    return tuple(beside.shape) == (*activation.shape[: activation.ndim - axes - 1], *sizes)


@dataclass
class _Gap:
    """How far two kinds of rows are apart."""

    apart: float = 0.0
    size: float = 0.0
    eps: float = 0.0

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        gap = first - second
        self.apart, self.size = self.apart + float(gap.square().sum()), self.size + float(first.square().sum())
        self.eps = torch.finfo(first.dtype).eps
        return gap

    @property
    def is_real(self) -> bool:
        """Whether it is more than rounding."""
        return self.apart > (_ROUNDING * self.eps) ** 2 * self.size


@dataclass(frozen=True, eq=False)
class _Pair:
    """``E[(x - z) z^T]`` and ``E[z z^T]`` (g, n, n), ``E[x]`` and ``E[z]`` (g, n), float64, over so many rows (of equal
    importance that tell as much). ``added``: ``E[(s - t) z^T]`` (g, o, n) and ``E[s - t]`` (g, o) of what the outputs
    are added to.
    """

    drift: Tensor
    own: Tensor
    mean_x: Tensor
    mean_z: Tensor
    added: tuple[Tensor, Tensor] | None
    rows: int
    moved: bool
    """Whether x and z, or s and t, differ by more than rounding."""

    @classmethod
    def of(
        cls,
        site: Site,
        activations: Sequence[Tensor],
        importance: Sequence[Tensor | None] = (),
        beside: Sequence[Tensor | None] = (),
    ) -> _Pair:
        """From the activations of all dense runs and then those of all changing ones, and what the outputs are added to
        in these; with the importance of the rows of each pair, where it is known.
        """
        groups, outputs, width = site.matrix
        half = len(activations) // 2
        drift, own = (torch.zeros(groups, width, width, dtype=torch.float64) for _ in range(2))
        sums = torch.zeros(2, groups, width, dtype=torch.float64)
        sum_drift, total = (torch.zeros(groups, outputs, size, dtype=torch.float64) for size in (width, 1))
        if len(beside) != len(activations) or not all(map(_is_row_by_row, repeat(site), activations, beside)):
            beside = ()
        mass, square, inputs, added = 0.0, 0.0, _Gap(), _Gap()
        runs = zip_longest(activations[:half], activations[half:], importance[:half], beside[:half], beside[half:])
        for seed, (x, z, weights, s, t) in enumerate(runs):
            apart = None if s is None or t is None else (output_rows(site, s), output_rows(site, t))
            for (dense, places), (new, _) in zip(input_rows(site, x, seed), input_rows(site, z, seed), strict=True):
                exact = dense.dtype if dense.dtype == torch.float64 else torch.float32
                pairs = [(dense, new)] if apart is None else [(dense, new), (apart[0][places], apart[1][places])]
                rows = [v.to(exact).movedim(1, 0) for pair in pairs for v in pair]
                good = torch.stack([torch.isfinite(v).all(2).all(0) for v in rows]).all(0)
                each = (torch.ones(len(places)) if weights is None else weights[places]).to(rows[0])
                if not bool(good.all()):
                    rows, each = [v[:, good] for v in rows], each[good]
                scaled = rows[1] * each[:, None]
                drift += (inputs.between(rows[0], rows[1]).mT @ scaled).cpu()
                own += (rows[1].mT @ scaled).cpu()
                sums += torch.stack([rows[0] * each[:, None], scaled]).sum(2, dtype=torch.float64).cpu()
                if apart is not None:
                    between = added.between(rows[2], rows[3])
                    sum_drift += (between.mT @ scaled).cpu()
                    total += (between * each[:, None]).sum(1, dtype=torch.float64)[:, :, None].cpu()
                mass, square = mass + float(each.sum()), square + float(each.double().square().sum())
        scale = max(mass, 1e-30)
        rows_ = round(mass**2 / square) if square > 0 else 0
        mean_x, mean_z = sums / scale
        moved = inputs.is_real or added.is_real
        extra = (sum_drift / scale, total[:, :, 0] / scale) if beside else None
        return cls(drift / scale, own / scale, mean_x, mean_z, extra, rows_, moved)

    def target(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        """The weight B to fit, and the metric to fit it in."""
        drift, own = self.drift, self.own
        centred = metric.mean is not None
        if centred:
            drift = drift - (self.mean_x - self.mean_z)[:, :, None] * self.mean_z[:, None]
            own = own - self.mean_z[:, :, None] * self.mean_z[:, None]
            own.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        stable = shrunk(own, self.rows)
        mean = own.diagonal(dim1=-2, dim2=-1).mean(-1)
        damped = stable + torch.diag_embed((_RIDGE * mean + (mean == 0))[:, None].expand(-1, own.shape[-1]))
        dense = weight.reshape(len(own), -1, own.shape[-1])
        wanted = dense @ drift
        if self.added is not None:
            gap, mean_gap = self.added
            wanted += gap - mean_gap[:, :, None] * self.mean_z[:, None] if centred else gap
        change = torch.linalg.solve(damped, wanted.mT).mT
        second = stable if metric.second_moment is None else stable.reshape(metric.second_moment.shape)
        mean_z = None if metric.mean is None else self.mean_z.reshape(metric.mean.shape)
        return (dense + change).reshape(weight.shape), replace(metric, second_moment=second, mean=mean_z)
