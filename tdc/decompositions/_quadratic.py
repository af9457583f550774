"""The error in the metric as a quadratic function of one factor, for the equation of any decomposition.

The model is the layout's rebuild, ``X = sum of products of factors``, and the error is ``E = sum_g tr((W_g - X_g) S_g
(W_g - X_g)^T)``, S the second moment of the input (the identity without one). X is linear in each factor F, so that E
is quadratic in it: ``E = const - 2 <F, R> + <F, N F>``. Along the output axes of F that no other factor has, N is the
same matrix again and again, and along those that others have it is block-diagonal. What is left are the bonds and the
input axes of F:

* if they are few, the normal equations of each block are formed and solved;
* else F is improved by a few steps of conjugate gradients. The preconditioner is the Gram matrix of the other factors,
  with S taken for the Kronecker product of its marginals, and the inverse of the marginal of the factor's own axis.

R and N are products of the factors with W S and S, in the order of the fewest multiply-adds (:mod:`._contract`): with
few parameters that is far less than one product of X and S. As in :mod:`._modes`, S + ridge I
is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ..ir.layout import Piece
from ._contract import Named, contract, macs
from ._linalg import energy, power_of_two
from .base import Factors

__all__ = ["EXACT", "Factor", "Problem", "damped", "solve"]

_RIDGE = 1e-9
_DAMPING = 1e-3
_CLOSED = 1e-12
_CLOSED_SIZE = 2048
_CLOSED_ENTRIES = 1 << 24
_CLOSED_WORTH = 4
_WHOLE_GRAM = 512
_CG_STEPS = 3
EXACT = 1e-13
_CANCELS = 1e-6


class Problem:
    """A weight in canonical axes, the layout to fit and the metric; weight and S are divided by powers of two."""

    def __init__(self, weight: Tensor, layout: Layout, metric: Metric) -> None:
        self.layout, self.axes = layout, layout.axes
        output = layout.rebuild.output
        first, *rest = output.groups
        self.grouped = "g" in output.axes
        self.groups = self.axes["g"] if self.grouped else 1
        self.inputs = tuple(axis for group in rest for axis in group)
        self.order = output.axes
        self.full = [self.axes[axis] for axis in self.order]
        self.width = prod(self.axes[axis] for axis in self.inputs)
        self.height = prod(self.axes[axis] for axis in first) // self.groups
        self.scale = power_of_two(weight)
        scaled = weight / self.scale
        second = metric.second_moment
        self.relative = energy(scaled.reshape(self.groups, weight.shape[0] // self.groups, -1), metric)
        if prod(self.full) != weight.numel():
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
        self.products = self.image(self.weight)
        self.total = float((self.products * self.weight).sum())

    def _grown(self, weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Zeros up to the composite sizes; for linear weights."""
        rows, columns = self.height - weight.shape[0], self.width - weight.shape[1]
        weight = torch.nn.functional.pad(weight, (0, columns, 0, rows))
        return weight, None if second is None else torch.nn.functional.pad(second, (0, columns, 0, columns))

    @cached_property
    def marginals(self) -> dict[str, Tensor]:
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

    @cached_property
    def single(self) -> Tensor:
        assert self.second is not None
        return self.second.float()

    # ---- products

    def image(self, rows: Tensor) -> Tensor:
        """``rows @ S`` for rows (g, o, n)."""
        return rows if self.second is None else rows @ self.second

    @property
    def second_axes(self) -> tuple[str, ...]:
        return (*(("g",) if self.grouped else ()), *self.inputs, *(f"{axis}'" for axis in self.inputs))

    def metric(self, dtype: torch.dtype) -> list[Named]:
        """S between an axis of the input and its other self, ``i`` and ``i'``; nothing for the identity."""
        if self.second is None:
            return []
        second = self.single if dtype == torch.float32 else self.second
        return [(second.reshape([self.axes[axis.rstrip("'")] for axis in self.second_axes]), self.second_axes)]

    def other(self, axes: tuple[str, ...], mark: str = "'") -> tuple[str, ...]:
        """The axes of the other X of a product <X, X S>: bonds get another name, and axes of the input with an S."""
        inputs = self.inputs if self.second is not None else ()
        return tuple(f"{a}'" if a in inputs else a if a in self.order else f"{a}{mark}" for a in axes)

    def operands(self, piece: Piece, values: Mapping[str, Tensor]) -> list[Named]:
        terms = zip(piece.operands, piece.equation.inputs, strict=True)
        return [(values[name], term.axes) for name, term in terms]

    def whole(self, piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
        """What a piece rebuilds, (g, o, n); ``values``: factors with their axes apart."""
        product = contract(self.operands(piece, values), self.order)
        return product.reshape(self.groups, self.height, self.width)

    def rebuilt(self, values: Mapping[str, Tensor]) -> Tensor:
        return sum((self.whole(piece, values) for piece in self.layout.rebuild.pieces), self.weight.new_zeros(()))

    def error(self, values: Mapping[str, Tensor]) -> float:
        """E as a fraction of the mean square of the output."""
        if self.relative <= 0:
            return 0.0
        lost = self._expanded(values) if self.second is not None else 0.0
        if lost <= _CANCELS * self.total:
            rest = self.weight - self.rebuilt(values)
            lost = float((self.image(rest) * rest).sum())
        return max(lost, 0.0) / (self.relative / self.second_scale)

    def _expanded(self, values: Mapping[str, Tensor]) -> float:
        """E as ``<W, W S> - 2 <W S, X> + <X, X S>``; 0 where that takes more than a product with S."""
        pieces = self.layout.rebuild.pieces
        if self._expanded_macs > self.groups * self.height * self.width**2:
            return 0.0
        lost = self.total - 2 * float((self.products * self.rebuilt(values)).sum())
        for k, piece in enumerate(pieces):
            for later in pieces[k:]:
                mirrored = [(value, self.other(axes, "~")) for value, axes in self.operands(later, values)]
                both = [*self.operands(piece, values), *mirrored, *self.metric(torch.float64)]
                lost += (1 if later is piece else 2) * float(contract(both, ()))
        return lost

    @cached_property
    def _expanded_macs(self) -> int:
        pieces = [[term.axes for term in piece.equation.inputs] for piece in self.layout.rebuild.pieces]
        work = 0
        for k, piece in enumerate(pieces):
            for later in pieces[k:]:
                both = [*piece, *(self.other(axes, "~") for axes in later), self.second_axes]
                work += macs(both, (), self.axes)
        return work

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
        return Factor(self, name).solved(values)

    def work(self, names: Sequence[str]) -> int:
        """Multiply-adds of one sweep over these factors, about."""
        error = self._expanded_macs if self.second is not None else 0
        dense = self.groups * self.height * self.width * (self.width if self.second is not None else 1)
        return sum(Factor(self, name).work for name in names) + min(error, dense)


class Factor:
    """One factor of one piece. Its axes are bonds (summed in the piece), shared axes of the weight (other factors
    carry them too), and its own axes of the weight.
    """

    def __init__(self, problem: Problem, name: str) -> None:
        pieces = problem.layout.rebuild.pieces
        self.problem, self.name = problem, name
        self.piece = next(piece for piece in pieces if name in piece.operands)
        self.rest = [piece for piece in pieces if piece is not self.piece]
        terms = dict(zip(self.piece.operands, (term.axes for term in self.piece.equation.inputs), strict=True))
        self.axes, order = terms.pop(name), problem.order
        self.terms = terms
        around = {axis for axes in terms.values() for axis in axes}
        self.bonds = tuple(axis for axis in self.axes if axis not in order)
        self.shared = tuple(axis for axis in self.axes if axis in order and axis in around)
        self.own = tuple(axis for axis in self.axes if axis in order and axis not in around)
        coupled = problem.inputs if problem.second is not None else ()
        self.blocks = tuple(axis for axis in self.shared if axis not in coupled)
        self.unknowns = tuple(axis for axis in self.axes if axis in self.bonds or axis in coupled)
        self.copies = tuple(axis for axis in self.own if axis not in coupled)

    def size(self, axes: Sequence[str]) -> int:
        return prod(self.problem.axes[axis] for axis in axes)

    @cached_property
    def work(self) -> int:
        return self._closed_work if self.closed else self._descent_work

    @cached_property
    def closed(self) -> bool:
        """Whether to form the normal equations: they are small, and not much dearer than conjugate gradients."""
        size = self.size(self.unknowns)
        if size > _CLOSED_SIZE or self.size(self.blocks) * size**2 > _CLOSED_ENTRIES:
            return False
        return self.problem.second is None or self._closed_work <= _CLOSED_WORTH * self._descent_work

    @property
    def _normal_axes(self) -> list[tuple[str, ...]]:
        """The axes of what N is made of: the other factors, twice, and S."""
        problem, others = self.problem, [*self.terms.values()]
        second = [problem.second_axes] if problem.second is not None else []
        return [*others, *(problem.other(axes) for axes in others), *second]

    @cached_property
    def _closed_work(self) -> int:
        blocks, size = self.size(self.blocks), self.size(self.unknowns)
        output = (*self.blocks, *self.unknowns, *self.problem.other(self.unknowns))
        formed = macs(self._normal_axes, output, self.problem.axes)
        return formed + blocks * size**2 * (size // 3 + 2 * self.size(self.copies)) + self._right_work

    @cached_property
    def _descent_work(self) -> int:
        product = macs([*self._normal_axes, self.problem.other(self.axes)], self.axes, self.problem.axes)
        return product * (1 + _CG_STEPS) + self._right_work

    @cached_property
    def _right_work(self) -> int:
        problem = self.problem
        work = macs([problem.order, *self.terms.values()], self.axes, problem.axes)
        second = [problem.second_axes] if problem.second is not None else []
        for piece in self.rest:
            axes = [problem.other(term.axes, "~") for term in piece.equation.inputs]
            work += macs([*self.terms.values(), *axes, *second], self.axes, problem.axes)
        return work

    def solved(self, values: Mapping[str, Tensor]) -> Tensor:
        others = [(values[name], axes) for name, axes in self.terms.items()]
        right = self.right(values, others)
        if not self.closed:
            return self.descended(values[self.name], right, others)
        gram = self.gram(others)
        kept = (*self.blocks, *self.unknowns, *self.copies)
        rows = right.permute([self.axes.index(axis) for axis in kept]).reshape(*gram.shape[:2], -1)
        cube = solve(gram, rows, _CLOSED).reshape([self.problem.axes[axis] for axis in kept])
        return cube.permute([kept.index(axis) for axis in self.axes])

    def right(self, values: Mapping[str, Tensor], others: Sequence[Named]) -> Tensor:
        """R: half the derivative of E by the factor at zero, negative."""
        problem = self.problem
        right = contract([(problem.products.reshape(problem.full), problem.order), *others], self.axes)
        for piece in self.rest:
            mirrored = [(value, problem.other(axes, "~")) for value, axes in problem.operands(piece, values)]
            right = right - contract([*others, *mirrored, *problem.metric(right.dtype)], self.axes)
        return right

    def gram(self, others: Sequence[Named]) -> Tensor:
        """N as (blocks, unknowns, unknowns)."""
        mirrored = [(value, self.problem.other(axes)) for value, axes in others]
        output = (*self.blocks, *self.unknowns, *self.problem.other(self.unknowns))
        found = contract([*others, *mirrored, *self.problem.metric(torch.float64)], output)
        size = self.size(self.unknowns)
        return found.reshape(-1, size, size)

    def normal(self, value: Tensor, others: Sequence[Named]) -> Tensor:
        """``N value``."""
        problem = self.problem
        mirrored = [(other, problem.other(axes)) for other, axes in others]
        metric = problem.metric(value.dtype)
        return contract([*others, *mirrored, *metric, (value, problem.other(self.axes))], self.axes)

    def descended(self, value: Tensor, right: Tensor, others: Sequence[Named]) -> Tensor:
        """Conjugate gradients from the present value, in float32; the gradient they start from is in float64."""
        inverses = self.inverses(others)
        residual = (right - self.normal(value, others)).float()
        single = [(other.float(), axes) for other, axes in others]
        x, direction, last = torch.zeros_like(residual), torch.zeros_like(residual), 0.0
        for _ in range(_CG_STEPS):
            steepest = residual
            for inverse, axes in inverses:
                steepest = contract([(steepest, self.axes), (inverse, axes)], self._primed(axes))
            slope = float((residual * steepest).sum())
            if slope <= 0:
                break
            direction = steepest + (slope / last if last > 0 else 0.0) * direction
            image = self.normal(direction, single)
            curvature = float((direction * image).sum())
            if curvature <= 0:
                break
            x, residual, last = x + slope / curvature * direction, residual - slope / curvature * image, slope
        return value + x.to(value.dtype)

    def _primed(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{axis}'" if f"{axis}'" in axes else axis for axis in self.axes)

    def inverses(self, others: Sequence[Named]) -> list[Named]:
        """The preconditioner: Gram matrices of all bonds together, or of each if they are many, and of own axes."""
        problem = self.problem
        parts = [self.bonds] if self.size(self.bonds) <= _WHOLE_GRAM else [(axis,) for axis in self.bonds]
        found: list[Named] = []
        for part in parts if self.bonds else []:
            size, primed = self.size(part), tuple(f"{axis}'" for axis in part)
            gram = self.marginal_gram(part, others).reshape(-1, size, size)
            inverse = torch.linalg.inv(damped(gram, _DAMPING)).float()
            axes = (*self.shared, *part, *primed)
            found.append((inverse.reshape([problem.axes[axis.rstrip("'")] for axis in axes]), axes))
        if problem.second is not None:
            own = [axis for axis in self.own if axis in problem.inputs]
            found += [
                (torch.linalg.inv(damped(problem.marginals[axis], _DAMPING)).float(), (axis, f"{axis}'"))
                for axis in own
            ]
        return found

    def marginal_gram(self, part: tuple[str, ...], others: Sequence[Named]) -> Tensor:
        """(shared axes..., bonds ``part``, the same again), the other bonds traced, S as its marginals."""
        problem = self.problem
        traced = {axis for axis in self.bonds if axis not in part}
        inputs = [axis for axis in problem.inputs if axis not in self.axes] if problem.second is not None else []
        once = traced | ({*problem.order} - {*inputs})
        mirrored = [(value, tuple(a if a in once else f"{a}'" for a in axes)) for value, axes in others]
        marginals = [(problem.marginals[axis], (axis, f"{axis}'")) for axis in inputs]
        return contract([*others, *mirrored, *marginals], (*self.shared, *part, *(f"{axis}'" for axis in part)))


def damped(matrix: Tensor, amount: float) -> Tensor:
    """Symmetric positive semidefinite matrices with ``amount`` of their mean diagonal added to it."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    more = amount * mean + (mean == 0)
    return (matrix + matrix.mT) / 2 + torch.diag_embed(more[..., None].expand(*more.shape, matrix.shape[-1]))


def solve(gram: Tensor, right: Tensor, amount: float) -> Tensor:
    """Least squares by Cholesky, with as much damping as it needs."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(gram, amount))
        if not failed.any():
            return torch.cholesky_solve(right, factor)
        amount *= 100
