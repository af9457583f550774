"""What the formats of linear weights with split axes share: the weight as a cube, whitened by the marginals of the
second moment, truncated bases, lattices, and the convention of scale and sign.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ..ir.layout import Piece
from ._als import AlternatingDecomposition
from ._linalg import energy, power_of_two
from .base import Factors

__all__ = ["SplitDecomposition", "Whitened", "cube", "ladder", "leading", "settled", "singular_squares", "truncated"]

_POINTS = 12
_DIRECT = 512
_DAMPING = 1e-4
_EXTRA = 16
_ITERATIONS = 8


class SplitDecomposition(AlternatingDecomposition):
    """A format of linear weights. It is declined where :meth:`modes` finds no sizes to split into."""

    optimal_start: ClassVar[bool] = False
    """Whether the start is the best fit where the metric has no second moment; :meth:`squares` tells its errors."""

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        if "g" in axes:
            return ()
        found: dict[tuple[int, ...], str] = {}
        for variant in super().variants(axes):
            modes = self.modes(axes, variant)
            if modes:
                found.setdefault((len(self.full_ranks(axes, variant)), *modes.values()), variant)
        return tuple(found.values())

    @abstractmethod
    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]: ...

    def layout(self, axes: Mapping[str, int], ranks: Mapping[str, int], variant: str) -> Layout:
        if variant in self.equations and "g" not in axes and not self.modes(axes, variant):
            raise ValueError(f"{self.name} cannot split {axes['o']} x {axes['i']} as {variant!r} needs it")
        return super().layout(axes, ranks, variant)

    def squares(self, weight: Tensor, axes: Mapping[str, int], variant: str) -> Tensor:
        """What each rank adds to the squared norm of the best fit, from rank 1 on."""
        raise NotImplementedError

    def finish(self, factors: Factors, layout: Layout) -> Factors:
        return settled(factors, layout)

    def _fit(self, weight: Tensor, layout: Layout, metric: Metric, sweeps: int) -> tuple[Factors, float]:
        best = self.optimal_start and metric.second_moment is None
        return super()._fit(weight, layout, metric, 0 if best else sweeps)

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        if not lattice or not self.optimal_start or metric.second_moment is not None:
            return super().errors(weight, axes, metric, lattice, variant)
        scale = power_of_two(weight)
        squares = self.squares(weight / scale, axes, variant)
        total = energy((weight / scale)[None], metric)
        left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        ranks = [next(iter(point.values())) for point in lattice]
        return [min(1.0, float(left[rank]) / total) if total > 0 else 0.0 for rank in ranks]

    def family(
        self,
        axes: Mapping[str, int],
        variant: str,
        highest: int,
        multiple: int,
        ranks: Callable[[int], Mapping[str, int]],
    ) -> list[dict[str, int]]:
        """The points ``ranks(t)``, t up to ``highest``, cut to multiples within the full ranks, that store fewer
        numbers than the dense weight.
        """
        full = self.full_ranks(axes, variant)
        dense, points = axes["o"] * axes["i"], {}
        for t in ladder(highest, multiple):
            point = {a: min(rank, full[a]) // multiple * multiple for a, rank in ranks(t).items()}
            if min(point.values()) > 0 and self.layout(axes, point, variant).params < dense:
                points[tuple(point.values())] = point
        return list(points.values())


def ladder(highest: int, multiple: int) -> list[int]:
    """Multiples of ``multiple`` up to ``highest``: all of them, or a geometric sequence of twelve."""
    last = highest // multiple
    if last <= _POINTS:
        return [multiple * k for k in range(1, last + 1)]
    return sorted({multiple * round(last ** (k / (_POINTS - 1))) for k in range(_POINTS)})


def cube(weight: Tensor, layout: Layout) -> Tensor:
    """The weight with its split axes apart, bordered by zeros."""
    outputs, inputs = ([layout.axes[axis] for axis in group] for group in layout.rebuild.output.groups)
    rows, columns = prod(outputs) - weight.shape[0], prod(inputs) - weight.shape[1]
    return torch.nn.functional.pad(weight, (0, columns, 0, rows)).reshape(*outputs, *inputs)


class Whitened:
    """The weight cube in coordinates in which the Kronecker product of the marginals of S is the identity: with
    ``S ~ S1 x S2`` and ``S1 = L1 L1^T``, each axis of the input is multiplied by its L. Divided by a power of two.
    """

    def __init__(self, weight: Tensor, layout: Layout, metric: Metric) -> None:
        self.scale = power_of_two(weight)
        outputs, self.inputs = layout.rebuild.output.groups
        self.names = (*outputs, *self.inputs)
        self.cube = cube(weight / self.scale, layout)
        self.roots: dict[str, Tensor] = {}
        if metric.second_moment is not None:
            sizes = [layout.axes[axis] for axis in self.inputs]
            self.roots = _roots(metric.second_moment.reshape(weight.shape[1], -1), self.inputs, sizes)
        for axis, root in self.roots.items():
            place = self.names.index(axis)
            self.cube = (self.cube.movedim(place, -1) @ root).movedim(-1, place)

    def plain(self, factor: Tensor, axis: str, place: int) -> Tensor:
        """A factor, its axis ``place`` that of the input, in the coordinates of the weight."""
        if axis not in self.roots:
            return factor
        moved = factor.movedim(place, -1)
        flat = moved.reshape(-1, moved.shape[-1])
        solved = torch.linalg.solve_triangular(self.roots[axis], flat, upper=False, left=False)
        return solved.reshape(moved.shape).movedim(-1, place)


def _roots(second: Tensor, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Tensor]:
    missing = prod(sizes) - second.shape[0]
    second = second / power_of_two(second.diagonal())
    whole = torch.nn.functional.pad(second, (0, missing, 0, missing)).reshape(*sizes, *sizes)
    count, roots = len(sizes), {}
    for k, axis in enumerate(names):
        right = [count if j == k else j for j in range(count)]
        marginal = torch.einsum(whole, [*range(count), *right], [k, count])
        mean = marginal.diagonal().mean()
        scaled = marginal / mean if mean > 0 else torch.zeros_like(marginal)
        roots[axis] = torch.linalg.cholesky((scaled + scaled.mT) / 2 + _DAMPING * torch.eye(sizes[k]).to(scaled))
    return roots


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of that rank as (basis with orthonormal columns, coordinates).

    Of a big matrix and a small rank, by block iteration from a fixed random start (Halko, Martinsson and Tropp 2011).
    """
    rows, columns = matrix.shape
    if min(rows, columns) <= _DIRECT and max(rows, columns) <= 4 * _DIRECT:
        basis = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
        return basis, basis.mT @ matrix
    outer, inner = torch.linalg.qr(matrix) if rows > columns else (None, matrix)
    basis = leading(inner @ inner.mT, rank)
    return basis if outer is None else outer @ basis, basis.mT @ inner


def leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns. Of a big matrix and a small rank by block iteration."""
    size = gram.shape[0]
    gram = (gram + gram.mT) / 2
    if size <= _DIRECT or rank + _EXTRA > size // 8:
        return torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, rank + _EXTRA, generator=generator, dtype=gram.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    return basis @ torch.linalg.eigh(basis.mT @ gram @ basis).eigenvectors.flip(-1)[:, :rank]


def singular_squares(matrix: Tensor) -> Tensor:
    """Squared singular values, falling, of one matrix or of each of many."""
    rows, columns = matrix.shape[-2:]
    if max(rows, columns) <= _DIRECT:
        return torch.linalg.svdvals(matrix).square()
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def settled(factors: Factors, layout: Layout) -> Factors:
    """The factors in the convention of scale and sign. Of two factors each term of their sum has its norm in equal
    parts in both, of more factors each has the same norm; the largest entry, of all factors but the last, is positive.
    """
    values = dict(factors)
    for piece in layout.rebuild.pieces:
        values |= _pair(values, layout, piece) if len(piece.operands) == 2 else _chain(values, piece)
    return {name: values[name].reshape(layout.shapes[name]).contiguous() for name in layout.rebuild.factors}


def _pair(factors: Factors, layout: Layout, piece: Piece) -> Factors:
    sizes, terms = layout.axes, piece.equation.inputs
    common = [axis for axis in terms[0].axes if axis in terms[1].axes]
    rows, kept = [], []
    for name, term in zip(piece.operands, terms, strict=True):
        order = [*common, *(axis for axis in term.axes if axis not in common)]
        apart = factors[name].reshape([sizes[axis] for axis in term.axes])
        moved = apart.permute([term.axes.index(axis) for axis in order])
        kept.append((moved.shape, [order.index(axis) for axis in term.axes]))
        rows.append(moved.reshape(prod(sizes[axis] for axis in common), -1))
    first, second = rows
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    norms = [part.norm(dim=1, keepdim=True) for part in rows]
    ratio = (norms[1].where(norms[1] > 0, 1.0) / norms[0].where(norms[0] > 0, 1.0)).sqrt()
    ratio = ratio.where((norms[0] > 0) & (norms[1] > 0), 1.0) * torch.where(largest < 0, -1.0, 1.0)
    parts = (first * ratio, second / ratio)
    return {
        name: part.reshape(shape).permute(back)
        for name, part, (shape, back) in zip(piece.operands, parts, kept, strict=True)
    }


def _chain(factors: Factors, piece: Piece) -> Factors:
    parts = [factors[name] for name in piece.operands]
    norms = torch.stack([part.norm() for part in parts])
    if bool((norms > 0).all()):
        mean = norms.log().mean().exp()
        parts = [part * (mean / norm) for part, norm in zip(parts, norms, strict=True)]
    signs = [-1.0 if float(part.flatten()[part.abs().argmax()]) < 0 else 1.0 for part in parts[:-1]]
    parts = [part * sign for part, sign in zip(parts, [*signs, prod(signs)], strict=True)]
    return dict(zip(piece.operands, parts, strict=True))
