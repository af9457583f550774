"""The ranks of a layout and the singular values that speak of them.

A layout is a network of factors. Where a rank axis r joins two factors and nothing else joins the two parts of the
network that it connects, the weight is, for each entry of the axes that both parts hold (groups, say), a product ::

    W[rows, columns] = sum_r A[rows, r] B[r, columns]

of the axes of one part and of the other. By Eckart and Young (1936) the singular values of that matrix then tell what
each rank loses, whatever the factors inside A and B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import Decline, Layout, Rebuild
from .suggest import rule

__all__ = ["Suggested", "Unfolding", "singular_values", "unfolding"]


@dataclass(frozen=True, slots=True)
class Unfolding:
    """The weight as matrices, one for each entry of the ``shared`` axes; ``rows`` has the first of the other axes."""

    shared: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"({' '.join(self.rows)}) x ({' '.join(self.columns)})"


def unfolding(shape: Rebuild, rank: str) -> Unfolding | Decline:
    """The matrices whose rank is the size of that axis; declined where there are none: the axis belongs to more than
    two factors, is on a cycle of factors, or its product is one of several that are added.

    A pivoted factor counts with its identity block; its index puts rows in order and holds no numbers.
    """
    if len(shape.pieces) > 1:
        return Decline("it is a sum of products: the weight has no singular values of one of them alone")
    (piece,) = shape.pieces
    terms = [frozenset(term.axes) for term in piece.equation.inputs]
    holders = [k for k, axes in enumerate(terms) if rank in axes]
    names = ", ".join(piece.operands[k] for k in holders)
    if len(holders) != 2:
        return Decline(f"its rank {rank} belongs to {len(holders)} factors ({names}): it is the rank of no matrix")
    inner = frozenset(piece.equation.contracted) - {rank}
    behind = _joined(terms, holders[1], inner)
    if holders[0] in behind:
        return Decline(f"its rank {rank} is on a cycle of factors ({names}): it is the rank of no matrix")
    sides = [frozenset().union(*(terms[k] for k in range(len(terms)) if (k in behind) == far)) for far in (False, True)]
    shared = tuple(axis for axis in shape.output.axes if axis in sides[0] & sides[1])
    near, far = (tuple(a for a in shape.output.axes if a in side and a not in shared) for side in sides)
    first = next((axis for axis in shape.output.axes if axis not in shared), "")
    return Unfolding(shared, far, near) if first in far else Unfolding(shared, near, far)


def _joined(terms: Sequence[frozenset[str]], start: int, inner: frozenset[str]) -> set[int]:
    """The factors that a chain of summed axes joins to one of them, itself included."""
    found, edge = {start}, [start]
    while edge:
        axes = terms[edge.pop()] & inner
        new = [k for k, other in enumerate(terms) if k not in found and axes & other]
        found.update(new)
        edge += new
    return found


def singular_values(weight: Tensor, layout: Layout, matrix: Unfolding) -> Tensor:
    """Those of each of the matrices, falling, float64 (shared, least side), up to a common factor.

    Square roots of the eigenvalues of the smaller Gram matrix, so that no larger matrix than the weight is made;
    eigenvalues within its rounding are 0. ``weight`` has the canonical axes; where split axes have larger products, it
    is bordered by zeros, which count as entries.
    """
    output, sizes = layout.rebuild.output, layout.axes
    missing = [whole - own for whole, own in zip(output.shape(sizes), weight.shape, strict=True)]
    whole = weight.double()
    if any(missing):
        whole = torch.nn.functional.pad(whole, [n for m in reversed(missing) for n in (0, m)])
    order = [output.axes.index(axis) for axis in (*matrix.shared, *matrix.rows, *matrix.columns)]
    shape = [math.prod(sizes[axis] for axis in part) for part in (matrix.shared, matrix.rows, matrix.columns)]
    found = whole.reshape([sizes[axis] for axis in output.axes]).permute(order).reshape(shape)
    peak = float(found.abs().max())
    found = (found if shape[1] <= shape[2] else found.mT) / (peak if peak > 0 else 1.0)
    squares = torch.linalg.eigvalsh(found @ found.mT).flip(-1)
    rounding = squares[:, :1].clamp(min=0) * (max(shape[1:]) * torch.finfo(torch.float64).eps)
    return squares.where(squares > rounding, 0.0).sqrt()


class Suggested:
    """The ranks that an allocation suggests for one weight, in any layout.

    They are those of the weight as it is, as in the papers (:mod:`.suggest`); the metric, in which factors are fitted
    and errors measured, has no part in them. Of the matrices of an unfolding the largest rank counts. Singular values
    are worked out once for all layouts that have the same unfolding.
    """

    def __init__(self, allocation: str, weight: Tensor) -> None:
        self.allocation, self.weight = allocation, weight
        self._rule = rule(allocation)
        self._known: dict[object, int] = {}

    def ranks(self, layout: Layout, names: Iterable[str]) -> dict[str, int] | Decline:
        """A rank for each of the named axes, at most the size that the layout has for it, and less where the other
        axes of one of its two factors do not span as much, which loses nothing.

        Declined where an axis is the rank of no matrix, and where no rank is suggested: all would be lost.
        """
        found: dict[str, int] = {}
        shared: dict[str, tuple[str, ...]] = {}
        for name in names:
            matrix = unfolding(layout.rebuild, name)
            if isinstance(matrix, Decline):
                return matrix
            rank = self._rank(layout, matrix)
            if not rank:
                return Decline(f"{self.allocation} finds no rank {name}: the weight as {matrix} is all noise, or zero")
            found[name], shared[name] = min(rank, layout.axes[name]), matrix.shared
        return _spanned(layout, found, shared)

    def _rank(self, layout: Layout, matrix: Unfolding) -> int:
        sizes = layout.axes
        key = (matrix, tuple((axis, sizes[axis]) for axis in layout.rebuild.output.axes))
        if key not in self._known:
            values = singular_values(self.weight, layout, matrix).tolist()
            rows, columns = (math.prod(sizes[axis] for axis in part) for part in (matrix.rows, matrix.columns))
            self._known[key] = max(self._rule(each, rows, columns) for each in values)
        return self._known[key]


def _spanned(layout: Layout, ranks: dict[str, int], shared: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """The ranks, each lowered to the product of the other axes of either of its factors."""
    terms = [term.axes for term in layout.rebuild.factors.values()]
    changed = True
    while changed:
        changed = False
        for name, rank in ranks.items():
            sizes = {**layout.axes, **ranks, **dict.fromkeys((name, *shared[name]), 1)}
            least = min(math.prod(sizes[axis] for axis in axes) for axes in terms if name in axes)
            if least < rank:
                ranks[name], changed = least, True
    return ranks
