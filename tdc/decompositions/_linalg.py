"""Linear algebra shared by the decompositions: the optimal low-rank approximation in a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import Metric

__all__ = ["LowRank", "low_rank", "pivot_rows"]

_LARGEST_COEFFICIENT = 1.1


@dataclass(frozen=True, eq=False)
class LowRank:
    """Nested optimal approximations ``W_r = basis[:, :r] @ coordinates[:r]`` of one weight in one metric.

    ``basis`` (o, k) is orthonormal, ``coordinates = basis^T W`` (k, i), k = min(o, i), and ``tail[r]`` is the relative
    squared error left at rank r, r = 0..k.
    """

    basis: Tensor
    coordinates: Tensor
    tail: Tensor


_last: tuple[Tensor, int, Tensor | None, LowRank] | None = None


def low_rank(weight: Tensor, metric: Metric) -> LowRank:
    """Optimal nested low-rank approximations of ``weight`` (o, i), float64, in the metric.

    With S the second moment of the input (identity for ``weight``), the optimum of ``tr((W - X) S (W - X)^T)`` over
    rank-r X is the projection on the r leading eigenvectors of ``W S W^T`` (the Eckart-Young theorem in the metric;
    Chen et al., DRONE, 2021). No root and no inverse of S is taken, so a singular S is harmless: directions that the
    calibration data never excited are projected, not zeroed. For o > i the eigenproblem is solved on the triangular
    factor of W = Q T. The result for the last weight is kept, since several decompositions ask for the same one in
    turn.
    """
    global _last
    second = metric.second_moment
    version = 0 if weight.is_inference() else weight._version
    if _last is not None and _last[0] is weight and _last[1] == version and _last[2] is second:
        return _last[3]
    scale = _power_of_two(weight)
    scaled = weight / scale
    rows, columns = weight.shape
    outer, inner = torch.linalg.qr(scaled) if rows > columns else (None, scaled)
    if second is None:
        basis, singular, _ = torch.linalg.svd(inner, full_matrices=False)
        energy = singular.square()
    else:
        product = inner @ second @ inner.T
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        energy, basis = values.flip(0).clamp(min=0), vectors.flip(1)
    coordinates = basis.T @ inner
    basis = basis if outer is None else outer @ basis
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(basis)
    total = energy.sum()
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    result = LowRank(basis * sign, coordinates * sign.T * scale, tail / total if total > 0 else torch.zeros_like(tail))
    _last = (weight, version, second, result)
    return result


def _power_of_two(weight: Tensor) -> float:
    """A power of two near the largest magnitude: scaling by it is exact and keeps squares in range."""
    peak = float(weight.abs().max()) if weight.numel() else 0.0
    return 2.0 ** torch.frexp(torch.tensor(peak, dtype=torch.float64)).exponent.item() if peak else 1.0


def pivot_rows(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rows of an orthonormal ``basis`` (o, r): r well-conditioned pivot rows, then the others; both
    ascending.

    Rows of nearly the largest volume (maxvol: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin 2010): from
    the pivots of an LU factorisation, rows are exchanged while any coefficient of ``basis[others] @
    inv(basis[pivots])`` exceeds 1.1 in magnitude. Each exchange multiplies the volume by that coefficient, so the
    exchanges end; at most 4 r are made. On projections of trained networks this takes some 20 exchanges, and
    conditions as well as QR with column pivoting.
    """
    rows, rank = basis.shape
    triangles, exchanges = torch.linalg.lu_factor(basis)
    order = list(range(rows))
    for k, p in enumerate((exchanges - 1).tolist()):
        order[k], order[p] = order[p], order[k]
    lower = triangles[:rank].tril(-1) + torch.eye(rank, dtype=basis.dtype)
    rest = triangles[rank:]
    coef = torch.linalg.solve_triangular(lower, rest, upper=False, left=False, unitriangular=True)
    for _ in range(4 * rank if rows > rank else 0):
        other, pivot = divmod(int(coef.abs().argmax()), rank)
        largest = coef[other, pivot].clone()
        if abs(float(largest)) <= _LARGEST_COEFFICIENT:
            break
        change = coef[other].clone()
        change[pivot] -= 1
        coef -= (coef[:, pivot] / largest)[:, None] * change
        coef[other] = -change / largest
        coef[other, pivot] += 1
        order[pivot], order[rank + other] = order[rank + other], order[pivot]
    places = torch.tensor(order)
    return places[:rank].sort().values, places[rank:].sort().values
