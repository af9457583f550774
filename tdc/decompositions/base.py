"""What a decomposition states: its equation, the ranks it accepts, and how its factors are fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..ir import Layout, Metric, OpKind, Rebuild

__all__ = ["Decomposition", "Factors", "rebuild"]

Factors = dict[str, Tensor]


class Decomposition(ABC):
    """A family of layouts for a weight, and the best approximation of a weight in each of them.

    To add one, write one file in this folder (or an installed package with an entry point in the group
    ``tdc.decompositions``) with one subclass; nothing else changes. Everything that is not stated here (factor shapes,
    counts, cost, contraction order, the nodes that frontends emit) is derived from ``equations``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What it is good for, in one sentence."""
    kinds: ClassVar[frozenset[OpKind]]
    equations: ClassVar[Mapping[str, str]]
    """Variant -> rebuild equation (see :class:`tdc.ir.Rebuild`)."""

    @abstractmethod
    def sizes(self, variant: str, axes: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
        """Sizes of all axes of the variant's equation. Raises ValueError for ranks that do not exist."""

    @abstractmethod
    def full_ranks(self, axes: Mapping[str, int]) -> dict[str, int]:
        """The ranks at which the decomposition is exact for every weight of these axes."""

    @abstractmethod
    def rank_lattice(self, axes: Mapping[str, int], multiple: int) -> Sequence[dict[str, int]]:
        """The ranks worth proposing: multiples of ``multiple`` that store fewer numbers than the dense weight."""

    @abstractmethod
    def errors(self, weight: Tensor, metric: Metric, lattice: Sequence[Mapping[str, int]]) -> list[float]:
        """Relative squared error in the metric of the best fit at each point of the lattice, in [0, 1]."""

    @abstractmethod
    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        """The best factors in the metric, float64, named and shaped as ``layout.shapes``.

        ``weight`` is float64, finite and in canonical axes.
        """

    def variant(self, axes: Mapping[str, int]) -> str:
        """The variant to use for a weight of these axes; the first one unless a subclass knows better."""
        return next(iter(self.equations))

    def layout(self, axes: Mapping[str, int], ranks: Mapping[str, int], variant: str | None = None) -> Layout:
        """The layout for these ranks. Raises ValueError for an unknown variant or impossible ranks."""
        chosen = self.variant(axes) if variant is None else variant
        if chosen not in self.equations:
            raise ValueError(f"{self.name} has no variant {chosen!r}; it has {sorted(self.equations)}")
        full = self.full_ranks(axes)
        if set(ranks) != set(full):
            raise ValueError(f"{self.name} has the ranks {sorted(full)}; got {sorted(ranks)}")
        for axis, rank in ranks.items():
            if not 1 <= rank <= full[axis]:
                raise ValueError(f"{self.name}: rank {axis}={rank} is not in 1..{full[axis]}")
        return Layout(Rebuild.parse(self.equations[chosen]), tuple(self.sizes(chosen, axes, ranks).items()))


def rebuild(factors: Factors, layout: Layout) -> Tensor:
    """The dense weight in canonical axes that the factors stand for, by the layout's equation."""
    shape = layout.rebuild
    axes = layout.axes

    def part(piece: int) -> Tensor:
        equation = shape.pieces[piece].equation
        operands = [
            factors[name].reshape([axes[a] for a in term.axes])
            for name, term in zip(shape.pieces[piece].operands, equation.inputs, strict=True)
        ]
        return torch.einsum(equation.subscripts(), *operands).reshape(equation.output.shape(axes))

    parts = [part(k) for k in range(len(shape.pieces))]
    if not shape.join:
        return torch.stack(parts).sum(0)
    dim = [group for (group,) in shape.output.groups].index(shape.join)
    stacked = torch.cat(parts, dim)
    index = factors[shape.index].long()
    return stacked.index_select(dim, index if shape.at else torch.argsort(index))
