"""Alternating least squares in the metric, for the equation of any decomposition.

The model is the layout's rebuild, ``X = sum of products of factors``, and the error is ``E = sum_g tr((W_g - X_g) S_g
(W_g - X_g)^T)``, S the second moment of the input (the identity without one). X is linear in each factor, so that E is
quadratic in it:

* a factor that carries no axis of the input is the solution of small normal equations, with the Gram matrix of the
  other factors in S;
* any other one is improved by a few steps of conjugate gradients on its normal equations, which are never formed.
  The preconditioner is the Gram matrix of the other factors, with S taken for the Kronecker product of its marginals,
  and the inverse of the marginal of the factor's own axis.

Without S all factors have closed forms. E never rises but by rounding; the best factors are kept. As in
:mod:`._modes`, S + ridge I is used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import log, prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ..ir.layout import Piece
from ._linalg import energy, power_of_two
from .base import Decomposition, Factors

__all__ = ["AlternatingDecomposition", "Problem", "refine"]

_RIDGE = 1e-9
_DAMPING = 1e-3
_CLOSED = 1e-12
_CG_STEPS = 3
_LEAST_GAIN = 2e-3
_EXACT = 1e-13
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Problem:
    """A weight in canonical axes, the layout to fit and the metric; weight and S are divided by powers of two."""

    def __init__(self, weight: Tensor, layout: Layout, metric: Metric) -> None:
        self.layout, self.axes = layout, layout.axes
        output = layout.rebuild.output
        first, *rest = output.groups
        self.groups = self.axes["g"] if "g" in output.axes else 1
        self.inputs = tuple(axis for group in rest for axis in group)
        self.order = output.axes
        self.full = [self.axes[axis] for axis in self.order]
        self.width = prod(self.axes[axis] for axis in self.inputs)
        self.height = prod(self.axes[axis] for axis in first) // self.groups
        self.scale = power_of_two(weight)
        scaled = weight / self.scale
        self.relative = energy(scaled.reshape(self.groups, weight.shape[0] // self.groups, -1), metric)
        second = metric.second_moment
        self.padded = prod(self.full) != weight.numel()
        if self.padded:
            scaled, second = self._grown(scaled, second)
        self.weight = scaled.reshape(self.groups, self.height, self.width)
        self.second_scale, self.second = 1.0, None
        if second is not None:
            second = second.reshape(-1, self.width, self.width)
            self.second_scale = power_of_two(second.diagonal(dim1=1, dim2=2))
            second = second / self.second_scale
            mean = float(second.diagonal(dim1=1, dim2=2).mean())
            second.diagonal(dim1=1, dim2=2).add_(_RIDGE * mean if mean > 0 else 1.0)
            self.second = second
            self.single = second.float()
            self.marginals = self._marginals()

    def _grown(self, weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Zeros up to the composite sizes; for linear weights."""
        rows, columns = self.height - weight.shape[0], self.width - weight.shape[1]
        weight = torch.nn.functional.pad(weight, (0, columns, 0, rows))
        return weight, None if second is None else torch.nn.functional.pad(second, (0, columns, 0, columns))

    def _marginals(self) -> dict[str, Tensor]:
        """Axis of the input -> (k, k), S averaged over groups and the other axes, with a mean diagonal of 1."""
        assert self.second is not None
        sizes = [self.axes[axis] for axis in self.inputs]
        cube = self.second.mean(0).reshape(*sizes, *sizes)
        count = len(sizes)
        found = {}
        for k, axis in enumerate(self.inputs):
            left = [*range(count)]
            right = [count if j == k else j for j in range(count)]
            marginal = torch.einsum(cube, left + right, [k, count])
            mean = marginal.diagonal().mean()
            found[axis] = marginal / mean if mean > 0 else torch.eye(sizes[k], dtype=cube.dtype)
        return found

    # ---- products

    def image(self, rows: Tensor) -> Tensor:
        """``rows @ S`` for rows (g, o, n)."""
        if self.second is None:
            return rows
        return rows @ (self.single if rows.dtype == torch.float32 else self.second)

    def whole(self, piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
        """What a piece rebuilds, (g, o, n); ``values``: factors with their axes apart."""
        product = _einsum(
            [(values[name], term.axes) for name, term in zip(piece.operands, piece.equation.inputs, strict=True)],
            self.order,
        )
        return product.reshape(self.groups, self.height, self.width)

    def rebuilt(self, values: Mapping[str, Tensor]) -> Tensor:
        return sum((self.whole(piece, values) for piece in self.layout.rebuild.pieces), self.weight.new_zeros(()))

    def error(self, values: Mapping[str, Tensor]) -> float:
        """E as a fraction of the mean square of the output."""
        rest = self.weight - self.rebuilt(values)
        lost = float((self.image(rest) * rest).sum())
        return max(lost, 0.0) / (self.relative / self.second_scale) if self.relative > 0 else 0.0

    def apart(self, factors: Factors) -> Factors:
        """Stored factors with every axis by itself, and the scale of the weight taken out."""
        terms = self.layout.rebuild.factors
        values = {name: factors[name].reshape([self.axes[axis] for axis in terms[name].axes]) for name in terms}
        for piece in self.layout.rebuild.pieces:
            values[piece.operands[0]] = values[piece.operands[0]] / self.scale
        return values

    def stored(self, values: Mapping[str, Tensor]) -> Factors:
        """The opposite of :meth:`apart`."""
        values = dict(values)
        for piece in self.layout.rebuild.pieces:
            values[piece.operands[0]] = values[piece.operands[0]] * self.scale
        shapes = self.layout.shapes
        return {name: value.reshape(shapes[name]).contiguous() for name, value in values.items()}

    # ---- one factor

    def update(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """The factor that lowers E for the others as they are."""
        piece = next(piece for piece in self.layout.rebuild.pieces if name in piece.operands)
        others = [p for p in self.layout.rebuild.pieces if p is not piece]
        target = self.weight - sum((self.whole(p, values) for p in others), self.weight.new_zeros(()))
        terms = dict(zip(piece.operands, (term.axes for term in piece.equation.inputs), strict=True))
        return _Factor(self, piece, name, terms, values).solved(target)


class _Factor:
    """One factor of one piece, the others fixed. Its axes are bonds (summed in the piece), shared axes of the weight
    (other factors carry them too), and its own axes of the weight.
    """

    def __init__(
        self,
        problem: Problem,
        piece: Piece,
        name: str,
        terms: Mapping[str, tuple[str, ...]],
        values: Mapping[str, Tensor],
    ) -> None:
        self.problem, self.piece, self.name, self.values = problem, piece, name, values
        self.axes = terms[name]
        self.others = [(values[n], terms[n]) for n in piece.operands if n != name]
        around = {axis for _, axes in self.others for axis in axes}
        order = problem.order
        self.bonds = tuple(axis for axis in self.axes if axis not in order)
        self.shared = tuple(axis for axis in self.axes if axis in order and axis in around)
        self.own = tuple(axis for axis in self.axes if axis in order and axis not in around)

    def solved(self, target: Tensor) -> Tensor:
        problem = self.problem
        closed = problem.second is None or not any(axis in problem.inputs for axis in self.axes)
        right = self.adjoint(problem.image(target))
        if closed:
            gram = self.gram(exact=True)
            return self.from_rows(_solve(gram, self.to_rows(right), _CLOSED))
        return self.descended(target)

    def adjoint(self, rows: Tensor) -> Tensor:
        """Derivative of ``<rows, X>`` by the factor."""
        cube = rows.reshape(self.problem.full)
        return _einsum([(cube, self.problem.order), *((v.to(rows.dtype), a) for v, a in self.others)], self.axes)

    def gram(self, *, exact: bool) -> Tensor:
        """Gram matrices of what multiplies the factor, (shared axes..., bonds, bonds): in S, or in its marginals."""
        problem = self.problem
        inputs = [axis for axis in problem.inputs if axis not in self.axes]
        inner = {axis for _, axes in self.others for axis in axes if axis not in problem.order}
        twice = (inner | set(inputs)) if problem.second is not None else inner
        name = {axis: f"{axis}'" for axis in twice}
        second = [(value, tuple(name.get(axis, axis) for axis in axes)) for value, axes in self.others]
        operands = [*self.others, *second]
        if problem.second is not None and exact:
            sizes = [problem.axes[axis] for axis in problem.inputs]
            cube = problem.second.reshape(problem.groups, *sizes, *sizes)
            operands.append((cube, ("g", *problem.inputs, *(name[axis] for axis in problem.inputs))))
        elif problem.second is not None:
            operands += [(problem.marginals[axis], (axis, name[axis])) for axis in inputs]
        result = (*self.shared, *self.bonds, *(name.get(axis, axis) for axis in self.bonds))
        found = _einsum(operands, result)
        size = prod(problem.axes[axis] for axis in self.bonds)
        return found.reshape(-1, size, size)

    def to_rows(self, value: Tensor) -> Tensor:
        """(shared, bonds, own) as (shared..., bonds, own) matrices."""
        order = [self.axes.index(axis) for axis in (*self.shared, *self.bonds, *self.own)]
        sizes = self.problem.axes
        bonds, own = (prod(sizes[axis] for axis in part) for part in (self.bonds, self.own))
        return value.permute(order).reshape(-1, bonds, own)

    def from_rows(self, rows: Tensor) -> Tensor:
        kept = (*self.shared, *self.bonds, *self.own)
        cube = rows.reshape([self.problem.axes[axis] for axis in kept])
        return cube.permute([kept.index(axis) for axis in self.axes])

    def descended(self, target: Tensor) -> Tensor:
        """Conjugate gradients from the present value, in float32; the gradient they start from is exact."""
        problem, value = self.problem, self.values[self.name]
        rest = target - problem.whole(self.piece, self.values)
        residual = self.adjoint(problem.image(rest)).float()
        gram = self.gram(exact=False)
        factor = torch.linalg.cholesky(_damped(gram, _DAMPING)).float()
        own = [axis for axis in self.own if axis in problem.inputs]
        inverses = [(torch.linalg.inv(_damped(problem.marginals[axis], _DAMPING)).float(), axis) for axis in own]
        single = {name: v.float() for name, v in self.values.items() if name in self.piece.operands}
        self.others = [(v.float(), a) for v, a in self.others]
        x, direction, last = torch.zeros_like(residual), torch.zeros_like(residual), 0.0
        for _ in range(_CG_STEPS):
            steepest = self.from_rows(torch.cholesky_solve(self.to_rows(residual), factor))
            for inverse, axis in inverses:
                renamed = tuple(f"{a}'" if a == axis else a for a in self.axes)
                steepest = _einsum([(steepest, renamed), (inverse, (f"{axis}'", axis))], self.axes)
            slope = float((residual * steepest).sum())
            if slope <= 0:
                break
            direction = steepest + (slope / last if last > 0 else 0.0) * direction
            image = self.adjoint(problem.image(problem.whole(self.piece, {**single, self.name: direction})))
            curvature = float((direction * image).sum())
            if curvature <= 0:
                break
            x, residual, last = x + slope / curvature * direction, residual - slope / curvature * image, slope
        return value + x.to(value.dtype)


def _einsum(operands: Sequence[tuple[Tensor, tuple[str, ...]]], output: tuple[str, ...]) -> Tensor:
    known = dict.fromkeys(axis for _, axes in operands for axis in axes)
    code = dict(zip(known, _LETTERS, strict=False))
    text = ",".join("".join(code[axis] for axis in axes) for _, axes in operands)
    return torch.einsum(f"{text}->{''.join(code[axis] for axis in output)}", *(value for value, _ in operands))


def _damped(matrix: Tensor, amount: float) -> Tensor:
    """Symmetric positive semidefinite matrices with ``amount`` of their mean diagonal added to it."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    more = amount * mean + (mean == 0)
    return (matrix + matrix.mT) / 2 + torch.diag_embed(more[..., None].expand(*more.shape, matrix.shape[-1]))


def _solve(gram: Tensor, right: Tensor, amount: float) -> Tensor:
    """Least squares by Cholesky, with as much damping as it needs."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(_damped(gram, amount))
        if not failed.any():
            return torch.cholesky_solve(right, factor)
        amount *= 100


def refine(
    factors: Factors,
    layout: Layout,
    weight: Tensor,
    metric: Metric,
    *,
    sweeps: int = 12,
    names: Sequence[str] | None = None,
) -> tuple[Factors, float]:
    """Alternating least squares from a start: ``(factors, relative squared error)``, never worse than the start.

    Stops where a sweep gains less than 0.2 % of the error. ``names``: the factors to fit, in this order; all by
    default. The factors of each piece come with equal norms.
    """
    problem = Problem(weight, layout, metric)
    values = problem.apart(factors)
    best, least = values, problem.error(values)
    start = least
    for _ in range(sweeps if least > _EXACT else 0):
        for name in names if names is not None else layout.rebuild.factors:
            values = {**values, name: problem.update(name, values)}
        values = _balanced(problem, values)
        error = problem.error(values)
        if not error < least:
            break
        gained, best, least = least - error, values, error
        if least <= _EXACT or gained < _LEAST_GAIN * least:
            break
    if least == start:
        return {name: factors[name] for name in layout.rebuild.factors}, start
    return problem.stored(best), least


def _balanced(problem: Problem, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every piece with its norm spread evenly over its factors."""
    values = dict(values)
    for piece in problem.layout.rebuild.pieces:
        norms = [float(values[name].norm()) for name in piece.operands]
        if all(norm > 0 for norm in norms):
            mean = torch.tensor(norms, dtype=torch.float64).log().mean().exp()
            for name, norm in zip(piece.operands, norms, strict=True):
                values[name] = values[name] * (float(mean) / norm)
    return values


class AlternatingDecomposition(Decomposition):
    """A decomposition without a closed form in the metric: a start, then alternating least squares.

    Its errors are those of short fits at a few points of the lattice, and between them by interpolation (the logarithm
    of the error over that of the stored numbers).
    """

    probes = 5
    """Points of the lattice at which a fit is made to predict errors."""

    @abstractmethod
    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        """Factors to begin with, float64, shaped as ``layout.shapes``; exact at full rank."""

    def finish(self, factors: Factors, layout: Layout) -> Factors:
        """The factors in this format's convention of sign and scale; the weight that they rebuild stays."""
        return factors

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        return self._fit(weight, layout, metric, sweeps=12)[0]

    def _fit(self, weight: Tensor, layout: Layout, metric: Metric, sweeps: int) -> tuple[Factors, float]:
        factors, error = refine(self.start(weight, layout, metric), layout, weight, metric, sweeps=sweeps)
        return self.finish(factors, layout), error

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        if not lattice:
            return []
        layouts = [self.layout(axes, ranks, variant) for ranks in lattice]
        stored = [float(layout.params) for layout in layouts]
        places = sorted(range(len(lattice)), key=lambda k: stored[k])
        step = max(1, len(places) - 1) / max(1, min(self.probes, len(places)) - 1)
        probed = sorted(
            {places[round(k * step)] for k in range(min(self.probes, len(places)))}, key=lambda k: stored[k]
        )
        found: list[tuple[float, float]] = []
        for k in probed:
            error = min(1.0, self._fit(weight, layouts[k], metric, sweeps=2)[1])
            found.append((stored[k], min([error, *(e for _, e in found[-1:])])))
        return [_between(found, numbers) for numbers in stored]


def _between(found: Sequence[tuple[float, float]], numbers: float) -> float:
    """The error at that many stored numbers, from those at fewer and at more."""
    above = next((k for k, (n, _) in enumerate(found) if n >= numbers), len(found) - 1)
    (n1, e1), (n0, e0) = found[above], found[max(above - 1, 0)]
    if n1 == n0 or min(e0, e1) <= 0:
        return e1
    share = (log(numbers) - log(n0)) / (log(n1) - log(n0))
    return float(torch.exp(torch.tensor((1 - share) * log(e0) + share * log(e1))))
