"""Moments of what a site reads in the dense model and in one that is cut, and the weight to fit to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from tdc.ir import Metric, Site
from tdc.statistics import shrunk
from tdc.statistics.moments import gram, summing
from tdc.statistics.patches import input_rows, output_rows, window_lengths

__all__ = ["Pair"]

_RIDGES, _ALONE = (0.03, 0.3, 3.0), 0.01
"""Fractions of the diagonal; the last where there is one batch only."""
_FLOOR = 1e-5
"""Of the mean of the diagonal."""
_ROUNDING = 1e3
"""Units of the last place by which inputs may differ and still be taken for the same."""

Runs = Sequence[tuple[int, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]
"""Of each batch: its place, x, z, the importance of the rows, s and t (see :class:`Pair`)."""


@dataclass(frozen=True, eq=False)
class Pair:
    """With x the inputs in the dense model and z those in the other, ``E[(x - z) z^T]`` and ``E[z z^T]`` (g, n, n),
    ``E[x]`` and ``E[z]`` (g, n), float64, over so many rows (of equal importance that tell as much). ``added``:
    ``E[(s - t) z^T]`` (g, o, n) and ``E[s - t]`` (g, o) of what the outputs are added to in both. ``halves``: the same
    of every other batch, and of the rest; none of one batch.
    """

    drift: Tensor
    own: Tensor
    mean_x: Tensor
    mean_z: Tensor
    added: tuple[Tensor, Tensor] | None
    mass: float
    rows: int
    moved: bool
    """Whether x and z, or s and t, differ by more than rounding."""
    halves: tuple[Pair, ...] = ()

    @classmethod
    def of(
        cls,
        site: Site,
        activations: Sequence[Tensor],
        importance: Sequence[Tensor | None] = (),
        beside: Sequence[Tensor | None] = (),
    ) -> Pair:
        """From the activations of all dense runs and then those of all changing ones, and what the outputs are added to
        in these; with the importance of the rows of each pair, where it is known.
        """
        count = len(activations) // 2
        if len(beside) != len(activations) or not all(map(_is_row_by_row, repeat(site), activations, beside)):
            beside = [None] * len(activations)
        known = [*importance, *[None] * (count - len(importance))]
        runs = [
            (k, activations[k], activations[count + k], known[k], beside[k], beside[count + k]) for k in range(count)
        ]
        first = _moments(site, runs[::2])
        return first if count == 1 else first._with(_moments(site, runs[1::2]))

    def _with(self, other: Pair) -> Pair:
        """Both together."""
        mass = self.mass + other.mass
        share = self.mass / mass if mass > 0 else 0.5

        def mixed(a: Tensor, b: Tensor) -> Tensor:
            return share * a + (1 - share) * b

        added = None
        if self.added is not None and other.added is not None:
            added = (mixed(self.added[0], other.added[0]), mixed(self.added[1], other.added[1]))
        squares = sum(pair.mass**2 / pair.rows for pair in (self, other) if pair.rows)
        return Pair(
            mixed(self.drift, other.drift),
            mixed(self.own, other.own),
            mixed(self.mean_x, other.mean_x),
            mixed(self.mean_z, other.mean_z),
            added,
            mass,
            round(mass**2 / squares) if squares > 0 else 0,
            self.moved or other.moved,
            (self, other) if self.rows and other.rows else (),
        )

    def target(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        """The weight ``B = W + C (E[z z^T] + ridge)^-1`` to fit, ``C = W E[(x - z) z^T] + E[(s - t) z^T]``, and the
        metric to fit it in; of covariances where a bias takes up the means.

        B goes only a part of the way from W: ridge and part are those with which C of each half of the batches loses
        least on the other, in the metric's gradients.
        """
        dense = weight.reshape(len(self.own), -1, self.own.shape[-1])
        centred = metric.mean is not None
        wanted, own = self._problem(dense, centred)
        stable = shrunk(own, self.rows)
        ridge, part = self._step(dense, metric)
        target = (dense + part * _solved(wanted, own, stable, ridge)).reshape(weight.shape) if part > 0 else weight
        second = stable if metric.second_moment is None else stable.reshape(metric.second_moment.shape)
        mean = None if metric.mean is None else self.mean_z.reshape(metric.mean.shape)
        return target, replace(metric, second_moment=second, mean=mean)

    def _problem(self, dense: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
        """C (g, o, n) and ``E[z z^T]``, without the means where ``centred``."""
        drift, own = self.drift, self.own
        if centred:
            drift = drift - (self.mean_x - self.mean_z)[:, :, None] * self.mean_z[:, None]
            own = own - self.mean_z[:, :, None] * self.mean_z[:, None]
            own.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        wanted = dense @ drift
        if self.added is not None:
            gap, mean_gap = self.added
            wanted += gap - mean_gap[:, :, None] * self.mean_z[:, None] if centred else gap
        return wanted, own

    def _step(self, dense: Tensor, metric: Metric) -> tuple[float, float]:
        """The ridge, and the part of the way."""
        if not self.halves:
            return _ALONE, 1.0
        centred, gradient = metric.mean is not None, metric.gradient
        gradient = None if gradient is None else gradient.reshape(len(dense), *gradient.shape[-2:]).float()
        # Two numbers are wanted, of well-conditioned systems: float32 does for these, at half the time.
        problems = [tuple(part.float() for part in half._problem(dense, centred)) for half in self.halves]
        slope, curvature = dict.fromkeys(_RIDGES, 0.0), dict.fromkeys(_RIDGES, 0.0)
        for half, (wanted, own), (other, apart) in zip(self.halves, problems, problems[::-1], strict=True):
            stable = shrunk(own, half.rows).to(own)
            for ridge in _RIDGES:
                change = _solved(wanted, own, stable, ridge)
                weighed = change if gradient is None else gradient @ change
                slope[ridge] += float((weighed * other).sum())
                curvature[ridge] += float((weighed * (change @ apart)).sum())
        parts = {k: min(1.0, max(0.0, slope[k]) / curvature[k]) if curvature[k] > 0 else 0.0 for k in _RIDGES}
        best = min(_RIDGES, key=lambda k: parts[k] * (parts[k] * curvature[k] - 2 * slope[k]))
        return best, parts[best]


def _solved(wanted: Tensor, own: Tensor, stable: Tensor, ridge: float) -> Tensor:
    diagonal = own.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    damped = stable + torch.diag_embed(ridge * diagonal + _FLOOR * mean + (mean == 0))
    root, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return torch.linalg.solve(damped, wanted.mT).mT
    return torch.cholesky_solve(wanted.mT, root).mT


def _moments(site: Site, runs: Runs) -> Pair:
    groups, outputs, width = site.matrix
    drift, own = (torch.zeros(groups, width, width, dtype=summing(width)) for _ in range(2))
    sums = torch.zeros(2, groups, width, dtype=torch.float64)
    gap, mean_gap = (torch.zeros(groups, outputs, size, dtype=summing(size)) for size in (width, 1))
    mass, square, inputs, added, known = 0.0, 0.0, _Gap(), _Gap(), False
    for seed, x, z, weights, s, t in runs:
        apart = None if s is None or t is None else (output_rows(site, s), output_rows(site, t))
        known = apart is not None
        for (dense, places), (new, _) in zip(input_rows(site, x, seed), input_rows(site, z, seed), strict=True):
            if weights is not None and not bool((counts := weights[places] > 0).all()):
                dense, new, places = dense[counts.to(dense.device)], new[counts.to(new.device)], places[counts]
            exact = dense.dtype if dense.dtype == torch.float64 else torch.float32
            read = [dense, new] if apart is None else [dense, new, apart[0][places], apart[1][places]]
            rows = [v.to(exact).movedim(1, 0) for v in read]
            each = (torch.ones(len(places)) if weights is None else weights[places]).to(rows[0])
            if not bool(torch.isfinite(torch.stack([v.sum() for v in rows]).sum())):  # of one number first: quicker
                good = torch.stack([torch.isfinite(v).all(2).all(0) for v in rows]).all(0)
                rows, each = [v[:, good] for v in rows], each[good]
            scaled = rows[1] * each[:, None]
            drift += (inputs.between(rows[0], rows[1]).mT @ scaled).cpu()
            own += gram(rows[1], scaled).cpu()
            sums += torch.stack([each @ rows[0], scaled.sum(1)]).to("cpu", torch.float64)
            if apart is not None:
                between = added.between(rows[2], rows[3])
                gap += (between.mT @ scaled).cpu()
                mean_gap += (each @ between)[:, :, None].to("cpu", torch.float64)
            mass, square = mass + float(each.sum()), square + float(each.double().square().sum())
    scale = max(mass, 1e-30)
    mean_x, mean_z = sums / scale
    beside = (gap.double() / scale, mean_gap[:, :, 0] / scale) if known else None
    rows_ = round(mass**2 / square) if square > 0 else 0
    moved = inputs.is_real or added.is_real
    return Pair(drift.double() / scale, own.double() / scale, mean_x, mean_z, beside, mass, rows_, moved)


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
        self.apart += float(torch.linalg.vector_norm(gap)) ** 2
        self.size += float(torch.linalg.vector_norm(first)) ** 2
        self.eps = torch.finfo(first.dtype).eps
        return gap

    @property
    def is_real(self) -> bool:
        """Whether it is more than rounding."""
        return self.apart > (_ROUNDING * self.eps) ** 2 * self.size
