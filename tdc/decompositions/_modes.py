"""Reduction of an input mode, and at will of the outputs, of a weight in the metric of its input patches.

The weight W has the shape (g, t, a, d): g groups, t outputs of each, the mode a to be reduced, and the d other
positions of a patch. The second moment S (g, n, n), n = a d (a slow, d fast), is that of each group's patches; without
it S is the identity. The model of each group is ``X[t, a, d] = sum_sr U[t, s] G[s, r, d] V[r, a]``, or without U
``X[t, a, d] = sum_r G[t, r, d] V[r, a]``, and its error ``E = sum_g tr((W_g - X_g) S_g (W_g - X_g)^T)``.

All is computed for the weight and S divided by powers of two, and for S + ridge I. As V is orthonormal, the ridge
draws the core to the projected weight W V^T: directions that S never excited are projected, not zeroed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._linalg import power_of_two

__all__ = ["ModeCurves", "ModeFit", "fit_modes", "mode_curves"]

_RIDGE = 1e-9
"""Relative to the mean of S's diagonal: well above the rounding of a Cholesky factorisation in float64."""
_DAMPING = 1e-3
"""The same for inverses that only steer: in the start basis and the preconditioner."""
_CG_STEPS = 3
_RELAXATION = 1.6
_LEAST_GAIN = 1e-3
_EXACT = 1e-13
"""Errors below this fraction of the total are rounding."""


@dataclass(frozen=True, eq=False)
class ModeCurves:
    """Squared errors at all ranks of a nested sequence of bases of the mode: upper bounds of what a fit reaches.

    The first r columns of ``basis`` (g, a, a), orthonormal, span the start value of V at rank r. ``total`` is the
    error of X = 0, ``sum_g tr(W S W^T)``. The rows (g, a, d, t) of ``captured`` are the coordinates of W in an
    S-orthonormal basis of patches whose first r d rows span the patches that rank r can express: their energy is what
    rank r captures, and the eigenvalues of their Gram matrix (t, t) what each rank of U captures of it.
    """

    basis: Tensor
    total: float
    captured: Tensor = field(repr=False)
    unit: float = field(repr=False)
    _known: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def error(self, rank: int) -> float:
        """The error with the mode reduced to ``rank``, and all outputs."""
        return min(float(self._rest[rank]) * self.unit, self.total)

    @cached_property
    def _rest(self) -> Tensor:
        """The scaled energy that ranks 0, 1, ... of the mode leave."""
        energy = self.captured.square().sum((0, 2, 3))
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])

    def errors(self, rank: int, outputs: Sequence[int]) -> list[float]:
        """The errors with the mode reduced to ``rank`` and the outputs to each of ``outputs``."""
        if rank not in self._known:
            self._known[rank] = self._tail(rank)
        tail = self._known[rank]
        return [min(float(tail[min(s, len(tail) - 1)]) * self.unit, self.total) for s in outputs]

    def _tail(self, rank: int) -> Tensor:
        """The scaled error of U's ranks 0, 1, ... at this rank of the mode; beyond the last it stays the same."""
        rows = self.captured[:, :rank].flatten(1, 2)
        gram = rows.mT @ rows if rows.shape[1] > rows.shape[2] else rows @ rows.mT
        lost = torch.linalg.eigvalsh(gram).clamp(min=0).sum(0).cumsum(0).flip(0)
        return torch.cat([lost, lost.new_zeros(1)]) + self._rest[rank]


@dataclass(frozen=True, eq=False)
class ModeFit:
    """Factors of a weight: ``outer`` U (g, t, s) with orthonormal columns or None, ``core`` G (g, s or t, r, d),
    ``inner`` V (g, r, a) with orthonormal rows, and the squared error they reach.
    """

    outer: Tensor | None
    core: Tensor
    inner: Tensor
    error: float


class _Problem:
    """The weight (g, t, n) divided by ``scale``, a power of two, and S, to be divided by ``second_scale``."""

    def __init__(self, weight: Tensor, second: Tensor | None) -> None:
        self.groups, self.outputs, self.size, self.positions = weight.shape
        self.scale = power_of_two(weight)
        self.weight = weight.flatten(2) / self.scale
        self.second, self.second_scale, self.ridge = second, 1.0, 0.0
        if second is not None:
            diagonal = second.diagonal(dim1=1, dim2=2)
            self.second_scale = power_of_two(diagonal)
            mean = float((diagonal / self.second_scale).mean())
            self.ridge = _RIDGE * mean if mean > 0 else 1.0
        self.image = self.times_second(self.weight)
        self.total = float((self.image * self.weight).sum().clamp(min=0))
        self.regular_image = self.image + self.ridge * self.weight
        self.regular_total = float((self.regular_image * self.weight).sum())
        self.unit = self.scale * self.scale * self.second_scale

    def times_second(self, rows: Tensor) -> Tensor:
        """``rows @ S`` for rows (g, k, n), without the ridge."""
        return rows if self.second is None else (rows @ self.second).div_(self.second_scale)

    def contract(self, inner: Tensor, matrix: Tensor) -> Tensor:
        """``(V x I) matrix``: (g, n, k) to (g, r d, k)."""
        product = inner @ matrix.reshape(self.groups, self.size, -1)
        return product.view(self.groups, -1, matrix.shape[-1])

    def solve(self, inner: Tensor) -> tuple[Tensor | None, Tensor]:
        """The Cholesky factor L of ``P = (V x I) S (V x I)^T`` (g, r d, r d), and ``Y = L^-1 (V x I) S W^T``.

        ``L^-T Y`` is the least-squares solution for the core, and ``Y^T Y`` the energy that it captures. The factor
        of a leading block is the leading block of the factor, so the rows of Y serve all ranks of a nested V. L is
        None for the identity. The ridge grows if the rounding of a singular S makes P indefinite.
        """
        right = self.contract(inner, self.image.mT)
        if self.second is None:
            return None, right
        half = self.contract(inner, self.second)
        gram = self.contract(inner, half.mT).div_(self.second_scale)
        del half
        ridge = self.ridge
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(gram)
        while failed.any() and ridge < 1:
            gram.diagonal(dim1=1, dim2=2).add_(9 * ridge)
            ridge *= 10
            lower, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            raise ValueError("the second moment of the patches is not positive semidefinite")
        right += ridge * self.contract(inner, self.weight.mT)
        return lower, torch.linalg.solve_triangular(lower, right, upper=False)

    def kronecker(self) -> tuple[Tensor, Tensor]:
        """C (g, a, a) and D (g, d, d) with C x D near S: C is S averaged over the positions, D the average of S over
        the mode after whitening by C; both with the ridge.
        """
        a, d = self.size, self.positions
        if self.second is None:
            channel, position = (torch.eye(k, dtype=self.weight.dtype).repeat(self.groups, 1, 1) for k in (a, d))
            return channel, position
        second = self.second.view(self.groups, a, d, a, d)
        channel = torch.einsum("gadbd->gab", second) / (d * self.second_scale)
        channel.diagonal(dim1=1, dim2=2).add_(self.ridge)
        position = torch.einsum("gadbc,gab->gdc", second, torch.linalg.inv(_damped(channel)) / self.second_scale)
        position /= a
        position.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return channel, position


def _damped(matrix: Tensor) -> Tensor:
    """A symmetric psd ``matrix`` (g, k, k) with enough on its diagonal for a harmless inverse."""
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    return matrix + torch.diag_embed((_DAMPING * mean + (mean == 0))[:, None].expand(-1, matrix.shape[-1]))


def _start_basis(problem: _Problem, channel: Tensor, position: Tensor) -> Tensor:
    """The basis (g, a, a) whose first r columns span the optimal V of rank r, were S equal to C x D.

    With ``H[a, b] = sum_tdc W[t, a, d] D[d, c] W[t, b, c]`` and Q the eigenvectors of ``C^1/2 H C^1/2``, that is the
    span of ``C^-1/2 Q_r``, or without an inverse of ``H C^1/2 Q_r``: the Eckart-Young theorem in the metric. Columns
    that vanish, as W has no more rank, are completed by the QR factorisation.
    """
    cube = problem.weight.unflatten(2, (problem.size, problem.positions))
    used = torch.einsum("gtad,gtbd->gab", torch.einsum("gtac,gcd->gtad", cube, position), cube)
    values, vectors = torch.linalg.eigh(channel)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    product = root @ used @ root
    spans = used @ root @ torch.linalg.eigh((product + product.mT) / 2).eigenvectors.flip(2)
    length = spans.norm(dim=1, keepdim=True)
    return torch.linalg.qr(spans / torch.where(length > 0, length, 1.0)).Q


def mode_curves(weight: Tensor, second: Tensor | None) -> ModeCurves:
    """The errors of ``weight`` (g, t, a, d) in the metric ``second`` (g, a d, a d), at all ranks of the mode a and of
    the outputs, from one Cholesky factorisation; both float64. The squares of the error must fit in float64.
    """
    problem = _Problem(weight, second)
    basis = _start_basis(problem, *problem.kronecker())
    captured = problem.solve(basis.mT)[1].unflatten(1, (problem.size, problem.positions))
    return ModeCurves(basis, problem.total * problem.unit, captured, problem.unit)


@dataclass(frozen=True, eq=False)
class _State:
    """V, the core G (g, s or t, r d) and U that are optimal for it, and the scaled error in S + ridge I."""

    inner: Tensor
    core: Tensor
    outer: Tensor | None
    error: float


def _outer_and_core(problem: _Problem, inner: Tensor, outputs: int | None) -> _State:
    """The optimal core and U for an orthonormal V: least squares, then reduced-rank regression.

    With ``X = P^-1 (V x I) S W^T`` (r d, t) the U of rank s are the leading eigenvectors of ``X^T P X = Y^T Y``, and
    the core is ``U^T X^T`` (Izenman 1975).
    """
    lower, half = problem.solve(inner)
    solution = half if lower is None else torch.linalg.solve_triangular(lower.mT, half, upper=True)
    if outputs is None:
        return _State(inner, solution.mT, None, problem.regular_total - float(half.square().sum()))
    values, vectors = torch.linalg.eigh(half.mT @ half)
    outer = vectors[:, :, -outputs:].flip(2)
    error = problem.regular_total - float(values[:, -outputs:].sum())
    return _State(inner, outer.mT @ solution.mT, outer, error)


def _whole_mode(problem: _Problem, outputs: int | None) -> _State:
    """The optimum without reduction of the mode: V is the identity, and nothing is solved, so that it is exact."""
    inner = torch.eye(problem.size, dtype=problem.weight.dtype).repeat(problem.groups, 1, 1)
    if outputs is None:
        return _State(inner, problem.weight, None, 0.0)
    span, triangle = torch.linalg.qr(problem.weight)  # U lies in the span of W, to the last digit
    regular = problem.times_second(triangle) + problem.ridge * triangle
    energy = (regular if problem.second is not None else triangle) @ triangle.mT
    values, vectors = torch.linalg.eigh((energy + energy.mT) / 2)
    outer = span @ vectors[:, :, -outputs:].flip(2)
    return _State(inner, outer.mT @ problem.weight, outer, float(values[:, :-outputs].sum()))


class _InnerStep:
    """Lowers the error over V for given U and core, where it is quadratic: ``sum_ab,rq V[r, a] M[ra, qb] V[q, b] / 2 -
    sum_ra B[r, a] V[r, a]`` with ``M[ra, qb] = sum_sdc G[s, r, d] S[ad, bc] G[s, q, c]`` and
    ``B[r, a] = sum_sd G[s, r, d] (U^T W S)[s, ad]``.

    A few steps of conjugate gradients with the preconditioner ``(sum_s G_s D G_s^T)^-1 x C^-1`` (S is near C x D) come
    close to the minimum: on VGG11, three reach what twenty reach with the diagonal of M. M is applied by big products
    in float32. The step is made ``_RELAXATION`` times as long, which lowers a quadratic for any factor below 2 and
    halves the number of sweeps. For the identity the minimum is known (Kroonenberg and de Leeuw 1980; HOOI).
    """

    def __init__(self, problem: _Problem, channel: Tensor, position: Tensor) -> None:
        self._problem, self._position = problem, position
        self._second: Tensor | None = None
        if problem.second is not None:
            self._second = (problem.second / problem.second_scale).float()
            self._second.diagonal(dim1=1, dim2=2).add_(problem.ridge)
        self._channel_inverse = torch.linalg.inv(_damped(channel)).float()

    def __call__(self, state: _State) -> Tensor:
        """The next V (g, r, a), orthonormal."""
        second, d = self._second, self._problem.positions
        image = self._problem.regular_image
        image = _stacked(image if state.outer is None else state.outer.mT @ image, d)
        rank = state.inner.shape[1]
        if second is None:
            return torch.linalg.eigh(image.mT @ image).eigenvectors[:, :, -rank:].flip(2).mT
        core = state.core.unflatten(2, (rank, d))
        gram = torch.einsum("gsrc,gsqc->grq", core @ self._position[:, None], core)
        core_inverse = torch.linalg.inv(_damped(gram)).float()
        wide = core.permute(0, 2, 3, 1).flatten(2)
        single = wide.float()

        def times(inner: Tensor) -> Tensor:
            rows = (single.mT @ inner).unflatten(1, (d, -1)).permute(0, 2, 3, 1).flatten(2)
            return single @ _stacked(rows @ second, d)

        def precondition(residual: Tensor) -> Tensor:
            return core_inverse @ residual @ self._channel_inverse

        start = state.inner.float()
        change = _conjugate_gradients(times, precondition, (wide @ image).float() - times(start))
        return torch.linalg.qr((state.inner + _RELAXATION * change).mT).Q.mT


def _stacked(rows: Tensor, positions: int) -> Tensor:
    """``rows`` (g, s, a d) as (g, d s, a)."""
    return rows.unflatten(2, (-1, positions)).permute(0, 3, 1, 2).flatten(1, 2)


def _conjugate_gradients(
    times: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], residual: Tensor
) -> Tensor:
    """``_CG_STEPS`` steps towards ``times(x) = residual`` from zero, of each group on its own."""
    x = torch.zeros_like(residual)
    direction, last = torch.zeros_like(residual), torch.zeros_like(residual[:, :1, :1])
    for _ in range(_CG_STEPS):
        steepest = precondition(residual)
        slope = (residual * steepest).sum((1, 2), keepdim=True)
        direction = steepest + torch.where(last > 0, slope / last, 0.0) * direction
        image = times(direction)
        curvature = (direction * image).sum((1, 2), keepdim=True)
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        x, residual, last = x + step * direction, residual - step * image, slope
    return x


def fit_modes(
    weight: Tensor,
    second: Tensor | None,
    rank: int,
    outputs: int | None,
    *,
    curves: ModeCurves | None = None,
    sweeps: int = 6,
) -> ModeFit:
    """Factors of ``weight`` (g, t, a, d) in the metric ``second`` (g, a d, a d), both float64, with the mode a reduced
    to ``rank`` and the outputs to ``outputs`` (None: no U).

    From the start V of ``curves`` (made anew if None) alternates between V and the closed form of U and core (Kalle et
    al., Tucker2-ALS-Sigma, with two blocks instead of three), at most ``sweeps`` times and until one gains less than
    0.1 %. The error never exceeds that of the curves by more than rounding. Each column of U and row of V has a
    positive largest entry.
    """
    problem = _Problem(weight, second)
    if rank == problem.size:
        return _signed(problem, _whole_mode(problem, outputs))
    channel, position = problem.kronecker()
    basis = curves.basis if curves is not None else _start_basis(problem, channel, position)
    best = _outer_and_core(problem, basis[:, :, :rank].mT, outputs)
    step = _InnerStep(problem, channel, position)
    for _ in range(sweeps if best.error > _EXACT * problem.regular_total else 0):
        state = _outer_and_core(problem, step(best), outputs)
        gain = best.error - state.error
        best = state if gain > 0 else best
        if gain <= _LEAST_GAIN * best.error:
            break
    return _signed(problem, best)


def _signed(problem: _Problem, state: _State) -> ModeFit:
    """The state in the scale of the weight and with the signs settled; its error in S is measured anew."""
    inner_sign, outer, core = _signs(state.inner, 2), state.outer, state.core
    rebuilt = (core.unflatten(2, (-1, problem.positions)).transpose(2, 3) @ state.inner[:, None]).transpose(2, 3)
    rebuilt = rebuilt.flatten(2) if outer is None else outer @ rebuilt.flatten(2)
    rest = problem.weight - rebuilt
    error = float((problem.times_second(rest) * rest).sum().clamp(min=0)) * problem.unit
    if outer is not None:
        outer_sign = _signs(outer, 1)
        outer, core = outer * outer_sign, core * outer_sign.mT
    core = core.unflatten(2, (-1, problem.positions)) * inner_sign[:, None] * problem.scale
    return ModeFit(outer, core, state.inner * inner_sign, error)


def _signs(vectors: Tensor, dim: int) -> Tensor:
    """The sign of the entry of largest magnitude along ``dim``, which is kept with size 1."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors)
