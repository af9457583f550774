"""Canonical polyadic (CP) formats: sums of outer products, one factor for each mode, all with one rank axis r.

``T[n1, ..., nm] = sum_r f1[n1, r] ... fm[nm, r]`` in each group (Hitchcock 1927). A fit starts from the CP of a small
Tucker-2 core, goes on by alternating least squares in the metric, and ends with a correction (:mod:`._sensitivity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._als import AlternatingDecomposition, refine
from ._conv import geometric, taps, weight_axes
from ._cores import WhiteCore
from ._linalg import power_of_two
from ._quadratic import solve
from ._sensitivity import SLACK, corrected, product, settled, spread
from .base import Factors

__all__ = ["CanonicalDecomposition", "canonical", "small_core"]

_LEAST_GAIN = 1e-5
_FEW = 12
_EXACT = 1e-15
_LEAST_DAMPING = 1e-14
_WORK = 40_000_000_000
_RESTRAINT = 1e-3
"""Damping of the normal equations at the start, times the relative error: on a random 512 x 512 x 3 x 3 weight it makes
terms a hundred times smaller at the same error."""
_SMALL = 64
"""Tucker-2 cores for the start keep all channels up to this number."""
_LETTERS = "abcdefhijklm"


def canonical(tensor: Tensor, rank: int, starts: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
    """Factors (g, n_k, rank) of a tensor (g, n_1, ..., n_m) by alternating least squares (Carroll and Chang 1970).

    Begins at ``starts``, or else at the leading singular vectors of the unfoldings and at two random points; the best
    after a few sweeps goes on. There are as many sweeps as ``_WORK`` multiply-adds allow, at least three; where they
    are few, the random points are left out.
    """
    work = (tensor.ndim - 1) * rank * (tensor.numel() + tensor.shape[0] * rank * rank)
    sweeps = min(200, max(3, _WORK // work))
    scale = power_of_two(tensor)
    scaled = tensor / scale
    generator = torch.Generator().manual_seed(rank)
    if starts:
        starts = [[first / scale, *rest] for first, *rest in starts]
    else:
        starts = [_leading(scaled, rank, generator)]
        starts += [_random(scaled, rank, generator) for _ in range(2 if sweeps >= _FEW else 0)]
    tried = [_alternated(scaled, start, min(5, max(1, sweeps // 8))) for start in starts]
    best = min(tried, key=lambda entry: entry[1])[0]
    factors = _alternated(scaled, best, sweeps)[0]
    factors[0] = factors[0] * scale
    return factors


def _random(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    groups, *sizes = tensor.shape
    return [torch.randn(groups, n, rank, generator=generator, dtype=tensor.dtype) / n**0.5 for n in sizes]


def _leading(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of every unfolding; where there are fewer than ``rank``, the rest is random."""
    found = _random(tensor, rank, generator)
    for k, factor in enumerate(found):
        unfolded = tensor.movedim(k + 1, 1).flatten(2)
        vectors = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(2)
        width = min(rank, vectors.shape[2])
        factor[:, :, :width] = vectors[:, :, :width]
    return found


def _alternated(tensor: Tensor, start: Sequence[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """The factors after so many sweeps, or where one gains too little of the error, and the squared error. Each
    sweep begins ahead of the last one on the line through the last two (Bro 1998), unless that does not pay.
    """
    factors, total = list(start), float(tensor.square().sum())
    error, ahead = total, list(start)
    for k in range(sweeps):
        damping = _RESTRAINT * error / total + _LEAST_DAMPING if total > 0 else 1.0
        swept, reached = _sweep(tensor, ahead, total, damping)
        if reached > error:
            swept, reached = _sweep(tensor, factors, total, damping)
        gain, last, factors, error = error - reached, factors, spread(swept), reached
        if error <= _EXACT * total:
            return spread(_sweep(tensor, factors, total, _LEAST_DAMPING)[0]), error
        if gain <= _LEAST_GAIN * error:
            break
        ahead = [new + ((k + 1) ** (1 / len(start)) - 1) * (new - old) for new, old in zip(factors, last, strict=True)]
    return factors, error


def _sweep(tensor: Tensor, factors: Sequence[Tensor], total: float, damping: float) -> tuple[list[Tensor], float]:
    """Each factor by least squares, one after the other, and the squared error."""
    found, captured = list(factors), 0.0
    modes = "abcdef"[: len(found)]
    for k in range(len(found)):
        others = [j for j in range(len(found)) if j != k]
        text = ",".join([f"g{modes}", *(f"g{modes[j]}r" for j in others)])
        right = torch.einsum(f"{text}->gr{modes[k]}", tensor, *(found[j] for j in others))
        gram = product([found[j].mT @ found[j] for j in others])
        rows = solve(gram, right, damping)
        found[k] = rows.mT
        captured = float((2 * right * rows - rows * (gram @ rows)).sum())
    return found, max(total - captured, 0.0)


def small_core(weight: Tensor, layout: Layout, metric: Metric, *, apart: bool = False) -> WhiteCore:
    """A core for the start at the layout's rank r: with no more channels than that, of many at most the half."""
    axes, rank = weight_axes(layout), layout.axes["r"]
    sizes = {name: min(axes[axis], rank, max(_SMALL, ceil(axes[axis] / 2))) for name, axis in (("s", "o"), ("r", "i"))}
    return WhiteCore(weight, axes, metric, sizes, apart=apart)


class CanonicalDecomposition(AlternatingDecomposition):
    """CP formats of convolutions: a start, weighted alternating least squares, and the error-preserving correction."""

    exact_at_full_rank = False
    probes = 4

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        return super().variants(axes) if taps(axes) > 1 else ()

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        """The rank at which it stores as much as dense."""
        modes = self.rebuild(axes, variant).factors.values()
        own = sum(prod(axes.get(axis, 1) for axis in term.axes if axis != "g") for term in modes)
        return {"r": max(1, prod(axes.values()) // axes["g"] // own)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        if taps(axes) == 1:
            return []
        limit = self.full_ranks(axes, variant)["r"]
        ranks = [{"r": r} for r in geometric(limit, multiple)]
        return [r for r in ranks if self.layout(axes, r, variant).params < prod(axes.values())]

    def fitted(self, layout: Layout) -> int:
        return layout.axes["r"]

    def finish(self, factors: Factors, layout: Layout) -> Factors:
        return settled(factors, layout)

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        factors, _ = refine(self.start(weight, layout, metric), layout, weight, metric)
        return corrected(factors, layout, weight, metric)

    def _fit(self, weight: Tensor, layout: Layout, metric: Metric, sweeps: int) -> tuple[Factors, float]:
        """For predictions; with a second moment sweeps are slow, and one has to do."""
        return super()._fit(weight, layout, metric, 1 if metric.second_moment is not None else sweeps)

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        found = super().errors(weight, axes, metric, lattice, variant)
        return [min(1.0, SLACK**2 * error) for error in found]
