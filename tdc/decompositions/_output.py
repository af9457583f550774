"""The output side of the metric: ``tr(G D S D^T)`` as the metric of another weight, ``tr(D' S D'^T)`` of ``D' = R D``.

With ``G = R^T R`` (Cholesky) the weight ``R W`` is fitted in the metric of the input alone, and ``R^-1`` goes into the
factor that holds the outputs. That is the optimum wherever the equation has a factor with all outputs in one axis,
which takes up any matrix from the left; formats that split the outputs are fitted in the metric of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..ir import Layout, Metric, Piece
from ._linalg import LowRank, low_rank, pivoted_rows
from .base import Decomposition, Factors, whole_factor

__all__ = ["Whitened", "absorbs", "along", "errors", "fit", "holder", "optimum", "whitened"]


@dataclass(frozen=True, eq=False)
class Whitened:
    """``R W`` in the shape of the weight, its metric without G, that of the weight itself without G, and R (g, o, o),
    None for the identity.
    """

    weight: Tensor
    metric: Metric
    plain: Metric
    root: Tensor | None

    @cached_property
    def back(self) -> Tensor | None:
        """``R^-1``."""
        if self.root is None:
            return None
        eye = torch.eye(self.root.shape[-1], dtype=self.root.dtype).expand_as(self.root)
        return torch.linalg.solve_triangular(self.root, eye, upper=True)


_last: tuple[Tensor, int, Metric, Whitened] | None = None


def whitened(weight: Tensor, metric: Metric) -> Whitened:
    """The weight (g o, i, ...), float64, with G taken out of its metric. The result for the last one is kept."""
    global _last
    if metric.gradient is None:
        return Whitened(weight, metric, metric, None)
    version = 0 if weight.is_inference() else weight._version
    if _last is not None and _last[0] is weight and _last[1] == version and _last[2] is metric:
        return _last[3]
    root = torch.linalg.cholesky(metric.gradient.reshape(-1, *metric.gradient.shape[-2:])).mT
    groups, outputs, _ = root.shape
    moment = metric.output_moment
    found = Whitened(
        (root @ weight.reshape(groups, outputs, -1)).reshape(weight.shape),
        replace(metric, gradient=None, output_moment=None if moment is None else root @ moment @ root.mT),
        replace(metric, gradient=None),
        root,
    )
    _last = (weight, version, metric, found)
    return found


def optimum(weight: Tensor, metric: Metric, groups: int) -> LowRank:
    """:func:`tdc.decompositions.low_rank` in any metric; the basis is not orthonormal where there is a G."""
    new = whitened(weight, metric)
    best = low_rank(new.weight, new.metric, groups)
    return best if new.back is None else replace(best, basis=new.back @ best.basis)


def absorbs(layout: Layout) -> bool:
    """Whether in every piece one factor has all outputs in one axis, for each group on its own."""
    return "o" in layout.rebuild.output.axes and all(holder(piece, layout) for piece in layout.rebuild.pieces)


def holder(piece: Piece, layout: Layout) -> str | None:
    """The factor of a piece that takes up a matrix on the outputs."""
    pairs = zip(piece.operands, piece.equation.inputs, strict=True)
    found = [name for name, term in pairs if "o" in term.axes]
    if len(found) != 1:
        return None
    groups = layout.axes.get("g", 1)
    return found[0] if groups == 1 or "g" in layout.rebuild.factors[found[0]].axes else None


def fit(decomposition: Decomposition, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
    """:meth:`Decomposition.fit` in any metric."""
    new = whitened(weight, metric)
    if new.back is None or not absorbs(layout):
        return decomposition.fit(weight, layout, new.plain)
    factors = decomposition.fit(new.weight, layout, new.metric)
    changed: dict[str, Tensor] = {}
    for piece in layout.rebuild.pieces:
        name = holder(piece, layout)
        assert name is not None
        if name not in changed:
            if name in layout.rebuild.pivots:
                changed |= _repivoted(factors, layout, piece, name, new.back)
            else:
                changed[name] = along("o", new.back, factors[name], name, layout)
    return {**factors, **changed}


def errors(
    decomposition: Decomposition,
    weight: Tensor,
    axes: Mapping[str, int],
    metric: Metric,
    lattice: Sequence[Mapping[str, int]],
    variant: str,
) -> list[float]:
    """:meth:`Decomposition.errors` in any metric; of formats that split the outputs in that of the input."""
    new = whitened(weight, metric)
    if lattice and absorbs(decomposition.layout(axes, lattice[0], variant)):
        return decomposition.errors(new.weight, axes, new.metric, lattice, variant)
    return decomposition.errors(weight, axes, new.plain, lattice, variant)


def _repivoted(factors: Factors, layout: Layout, piece: Piece, name: str, back: Tensor) -> dict[str, Tensor]:
    """R^-1 taken in by a factor U without its identity block: ``R^-1 U = stack M`` with new pivots; M goes to the
    factor that shares the rank.
    """
    pivot = layout.rebuild.pivots[name]
    term = layout.rebuild.factors[name]
    stack = whole_factor(factors, pivot, name, term, layout.axes)
    spread = back @ _with_groups(stack, term.axes)
    rows, coef, place = pivoted_rows(torch.linalg.qr(spread).Q)
    change = spread.gather(1, rows[:, :, None].expand(-1, -1, spread.shape[2]))
    pairs = zip(piece.operands, piece.equation.inputs, strict=True)
    other = next(n for n, t in pairs if n != name and pivot.rank in t.axes)
    return {
        name: coef.reshape(layout.shapes[name]),
        pivot.index: place.reshape(layout.shapes[pivot.index]),
        other: along(pivot.rank, change, factors[other], other, layout),
    }


def along(axis: str, matrix: Tensor, factor: Tensor, name: str, layout: Layout) -> Tensor:
    """A stored factor multiplied with ``matrix`` (g, n, n) along one of its axes, of size n."""
    axes = layout.rebuild.factors[name].axes
    whole = _with_groups(factor.reshape([layout.axes[a] for a in axes]), axes)
    place = 1 + [a for a in axes if a != "g"].index(axis)
    order = whole.movedim(place, 1)
    new = (matrix @ order.flatten(2)).reshape(order.shape).movedim(1, place)
    new = new.movedim(0, axes.index("g")) if "g" in axes else new[0]
    return new.reshape(layout.shapes[name]).contiguous()


def _with_groups(tensor: Tensor, axes: Sequence[str]) -> Tensor:
    """Groups first, of size one where the factor has none."""
    return tensor.movedim(axes.index("g"), 0) if "g" in axes else tensor[None]
