"""Linear algebra shared by the decompositions: the optimal low-rank approximation in a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import Metric

__all__ = [
    "LowRank",
    "energy",
    "low_rank",
    "mean_energy",
    "pivot_rows",
    "pivoted_columns",
    "pivoted_rows",
    "power_of_two",
]

_LARGEST_COEFFICIENT = 1.1


@dataclass(frozen=True, eq=False)
class LowRank:
    """Nested optimal approximations ``W_r = basis[:, :, :r] @ coordinates[:, :r]`` of one weight in one metric.

    For g groups ``basis`` (g, o, k) has orthonormal columns, ``coordinates = basis^T W`` (g, k, n), k = min(o, n), and
    ``tail[r]`` is the relative squared error left at rank r in every group, r = 0..k.
    """

    basis: Tensor
    coordinates: Tensor
    tail: Tensor

    def approximation(self, rank: int) -> Tensor:
        """``W_r`` as one matrix (o, n) per group: (g, o, n)."""
        return self.basis[:, :, :rank] @ self.coordinates[:, :rank]


_last: tuple[Tensor, int, int, Metric, LowRank] | None = None


def low_rank(weight: Tensor, metric: Metric, groups: int = 1) -> LowRank:
    """Optimal nested low-rank approximations of ``weight`` (g o, i, ...), float64, in the metric.

    With S the second moment of the input (identity for ``weight``), the optimum of ``tr((W - X) S (W - X)^T)`` over
    rank-r X is the projection on the r leading eigenvectors of ``W S W^T`` (the Eckart-Young theorem in the metric;
    Chen et al., DRONE, 2021). No root and no inverse of S is taken, so a singular S is harmless: directions that the
    calibration data never excited are projected, not zeroed. For o > n the eigenproblem is solved on the triangular
    factor of W = Q T. The result for the last weight is kept, since several decompositions ask for the same one in
    turn.
    """
    global _last
    version = 0 if weight.is_inference() else weight._version
    if _last is not None and _last[0] is weight and _last[1:3] == (version, groups) and _last[3] is metric:
        return _last[4]
    scale = power_of_two(weight)
    scaled = weight.reshape(groups, weight.shape[0] // groups, -1) / scale
    rows, columns = scaled.shape[1:]
    moment = metric.output_moment
    outer, inner = torch.linalg.qr(scaled) if rows > columns and moment is None else (None, scaled)
    if moment is None and metric.second_moment is None:
        basis, singular, _ = torch.linalg.svd(inner, full_matrices=False)
        energy = singular.square()
    else:
        if moment is None:
            assert metric.second_moment is not None
            product = inner @ metric.second_moment.reshape(-1, columns, columns) @ inner.mT
        else:
            product = moment / scale**2
        values, vectors = torch.linalg.eigh((product + product.mT) / 2)
        energy, basis = values.flip(-1).clamp(min=0), vectors.flip(-1)
    width = min(rows, columns)
    basis, energy = basis[..., :width], energy[..., :width].sum(0)
    coordinates = basis.mT @ inner
    basis = basis if outer is None else outer @ basis
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(basis)
    total = energy.sum() + mean_energy(scaled, metric)
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    relative = tail / total if total > 0 else torch.zeros_like(tail)
    result = LowRank(basis * sign, coordinates * sign.mT * scale, relative)
    _last = (weight, version, groups, metric, result)
    return result


def mean_energy(weight: Tensor, metric: Metric) -> Tensor:
    """``||W E[x]||^2``, summed over groups, of a weight (g, o, n): what the metric leaves to the bias; 0 without a
    mean.
    """
    if metric.mean is None:
        return weight.new_zeros(())
    mean = metric.mean.reshape(-1, weight.shape[-1], 1).to(weight)
    return (weight @ mean).square().sum()


def bias_shift(difference: Tensor, metric: Metric) -> Tensor | None:
    """``D E[x]`` for ``D = W - W_hat`` (g o, i, ...): what a bias must take up; None if the site has none."""
    if metric.mean is None:
        return None
    mean = metric.mean.reshape(-1, metric.mean.shape[-1], 1)
    groups = mean.shape[0]
    return (difference.reshape(groups, difference.shape[0] // groups, -1) @ mean).flatten()


def energy(weight: Tensor, metric: Metric) -> float:
    """``tr(W S W^T) + ||W E[x]||^2``, summed over groups, of a weight (g, o, n): the mean square of the site's output
    without its bias.
    """
    if metric.output_moment is not None:
        spread = metric.output_moment.diagonal(dim1=-2, dim2=-1).sum()
    elif metric.second_moment is None:
        spread = weight.square().sum()
    else:
        moment = metric.second_moment.reshape(-1, weight.shape[-1], weight.shape[-1])
        spread = ((weight @ moment) * weight).sum()
    return float(spread + mean_energy(weight, metric))


def power_of_two(weight: Tensor) -> float:
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


def pivoted_rows(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U_g = stack[place] @ U_g[pivots]`` for bases (g, o, r) with full column rank: ``(pivots, coef, place)``.

    ``pivots`` (g, r) are the rows of nearly the largest volume, ``coef`` (g o - g r, r) the other rows in terms of
    them, and ``place`` (g o) int32 where each row lies in the stack of identities and coefficients, as
    :class:`tdc.ir.Pivot` has it. Choose on orthonormal bases: the coefficients are then small.
    """
    groups, rows, _ = basis.shape
    pivots, coefs, order = [], [], [torch.empty(0, dtype=torch.long)] * (2 * groups)
    for g in range(groups):
        kept, others = pivot_rows(basis[g])
        pivots.append(kept)
        coefs.append(torch.linalg.solve(basis[g][kept].T, basis[g][others].T).T)
        order[g], order[groups + g] = g * rows + kept, g * rows + others
    place = torch.argsort(torch.cat(order)).to(torch.int32)
    return torch.stack(pivots), torch.cat(coefs).contiguous(), place


def pivoted_columns(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the columns of (g, r, i) with orthonormal rows: ``(pivots, coef (g r, i - r), order (g i))``."""
    pivots, coef, place = pivoted_rows(basis.mT)
    groups, rank, columns = basis.shape
    coef = coef.reshape(groups, columns - rank, rank).mT.reshape(groups * rank, columns - rank)
    return pivots, coef.contiguous(), torch.argsort(place).to(torch.int32)
