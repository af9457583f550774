"""What a decomposition states: its equation, the ranks it accepts, and how its factors are fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..ir import Layout, Metric, Pivot, Rebuild, Term

__all__ = ["Decomposition", "Factors", "cancellation", "rebuild", "whole_factor"]

Factors = dict[str, Tensor]


class Decomposition(ABC):
    """A family of layouts for a weight, and the best approximation of a weight in each of them.

    To add one, write one file in this folder (or an installed package with an entry point in the group
    ``tdc.decompositions``) with one subclass; nothing else changes. Everything that is not stated here (factor shapes,
    counts, cost, contraction order, the nodes that frontends emit) is derived from ``equations`` and the ranks.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What it is good for, in one sentence."""
    equations: ClassVar[Mapping[str, str]]
    """Variant -> rebuild equation (see :class:`tdc.ir.Rebuild`). Of a linear weight it begins with ``o i =``, of a
    convolution's with ``(g o) i * =``, where ``*`` stands for the window axes ``p``, ``p q`` or ``p q z``. Axes of the
    weight may be split, ``(o1 o2) (i1 i2) =``: see :meth:`modes`."""
    by_default: ClassVar[bool] = True
    """Whether it is tried where the user names no formats. Formats that no measurement found on the front of accuracy
    against time are there to be named."""
    storage: ClassVar[bool] = False
    """Whether to propose it also where running its factors takes no fewer multiply-adds than dense: they then build the
    dense weight when the model is loaded."""
    exact_at_full_rank: ClassVar[bool] = True
    """Whether some ranks reproduce every weight; else ``full_ranks`` are the most that make sense."""
    estimates: ClassVar[bool] = False
    """Whether :meth:`errors` gives estimates, by fits at some points of the lattice, in place of errors or bounds."""
    between_layers: ClassVar[bool] = False
    """Whether it is one of the hidden units between layers: no weight has it by itself, and it has no variants."""
    projects_outputs: ClassVar[bool] = False
    """Whether a fit needs no more of the input than the moment of the output (``Metric.output_moment``)."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that it has equations for: ``linear``, ``convolution``."""
        conv = {_is_conv(text) for text in self.equations.values()}
        return tuple(name for name, written in (("linear", False), ("convolution", True)) if written in conv)

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        """The variants to propose for a weight of these axes: by default all that are written for its kind."""
        return tuple(v for v, text in self.equations.items() if _is_conv(text) == ("g" in axes))

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        """Sizes of the axes that the equation splits ``o`` and ``i`` into. Their products are at least those of the
        weight, which is taken to be bordered by zeros up to there.
        """
        return {}

    def same_fit(self, axes: Mapping[str, int], variant: str) -> tuple[str, ...]:
        """Other variants that write the same approximation at the same ranks."""
        return ()

    def too_large(self, axes: Mapping[str, int], variant: str) -> str:
        """Why a weight of these axes is not fitted, with the numbers, where that takes too much time or memory; ''
        where it is. Asked before anything is allocated.
        """
        return ""

    def needs_input(self, variant: str) -> bool:
        """Whether the fit needs the second moment of the input, or that of the output will do."""
        return not self.projects_outputs

    def fitted(self, layout: Layout) -> int:
        """Coordinates of the input whose coefficients a least-squares fit on the calibration data chose."""
        return 0

    @abstractmethod
    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        """The ranks at which the variant is exact for every weight of these axes."""

    @abstractmethod
    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        """The ranks worth proposing: multiples of ``multiple`` that store fewer numbers than the dense weight."""

    @abstractmethod
    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        """Relative squared error in the metric at each point of the lattice, in [0, 1]: of the best fit where it has a
        closed form, else an upper bound that the fit starts from, or an estimate (see :attr:`estimates`).
        """

    @abstractmethod
    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        """The best factors in the metric, float64, named and shaped as ``layout.shapes``.

        ``weight`` is float64, finite and in canonical axes.
        """

    def layout(self, axes: Mapping[str, int], ranks: Mapping[str, int], variant: str) -> Layout:
        """The layout for these ranks. Raises ValueError for an unknown variant or impossible ranks."""
        fitting = Decomposition.variants(self, axes)
        if variant not in fitting:
            raise ValueError(f"{self.name} has no variant {variant!r} for such a weight; it has {sorted(fitting)}")
        full = self.full_ranks(axes, variant)
        if set(ranks) != set(full):
            raise ValueError(f"{self.name} has the ranks {sorted(full)}; got {sorted(ranks)}")
        for axis, rank in ranks.items():
            if not 1 <= rank <= full[axis]:
                raise ValueError(f"{self.name}: rank {axis}={rank} is not in 1..{full[axis]}")
        modes = self.modes(axes, variant)
        return Layout(self.rebuild(axes, variant), (*axes.items(), *modes.items(), *ranks.items()))

    def rebuild(self, axes: Mapping[str, int], variant: str) -> Rebuild:
        """The variant's equation with the window axes of this weight."""
        return _parsed(self.equations[variant], tuple(axis for axis in axes if axis not in ("g", "o", "i")))


def _is_conv(equation: str) -> bool:
    return equation.startswith("(g ")


@lru_cache(maxsize=1024)
def _parsed(text: str, windows: tuple[str, ...]) -> Rebuild:
    return Rebuild.parse(text.replace("*", " ".join(windows)))


def rebuild(factors: Factors, layout: Layout) -> Tensor:
    """The dense weight in canonical axes that the factors stand for, by the layout's equation."""
    axes, shape = layout.axes, layout.rebuild
    parts = []
    for piece in shape.pieces:
        operands = [
            whole_factor(factors, shape.pivots.get(name), name, term, axes)
            for name, term in zip(piece.operands, piece.equation.inputs, strict=True)
        ]
        parts.append(torch.einsum(piece.equation.subscripts(), *operands).reshape(shape.output.shape(axes)))
    whole = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    if "g" in axes:
        return whole
    return whole[: axes["o"], : axes["i"]]


def cancellation(factors: Factors, layout: Layout) -> float:
    """The norm of the weight that the absolute values of the factors rebuild, over that of the weight that they
    rebuild: 1 where nothing cancels. Rounding errors of factors can grow by so much in the weight.
    """
    sizes = {name: f.abs() if f.is_floating_point() else f for name, f in factors.items()}
    norm = float(rebuild(factors, layout).norm())
    return float(rebuild(sizes, layout).norm()) / norm if norm > 0 else 1.0


def whole_factor(factors: Factors, pivot: Pivot | None, name: str, term: Term, axes: Mapping[str, int]) -> Tensor:
    """One factor with every axis of its term apart, the identity block of a pivoted one put in its place."""
    stored = factors[name]
    if pivot is None:
        return stored.reshape([axes[axis] for axis in term.axes])
    groups = axes.get("g", 1) if "g" in term.axes else 1
    rank, rest = axes[pivot.rank], axes[pivot.split] - axes[pivot.rank]
    coef = stored.reshape(groups, rest, rank) if pivot.leading else stored.reshape(groups, rank, rest).mT
    eye = torch.eye(rank, dtype=coef.dtype).expand(groups, rank, rank)
    stack = torch.zeros(groups * axes[pivot.split], groups, rank, dtype=coef.dtype)
    for g in range(groups):
        stack[g * rank : (g + 1) * rank, g] = eye[g]
        stack[groups * rank + g * rest : groups * rank + (g + 1) * rest, g] = coef[g]
    index = factors[pivot.index].long()
    rows = stack[index if pivot.leading else torch.argsort(index)]
    own = rows.reshape(groups, axes[pivot.split], groups, rank).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = own if pivot.leading else own.mT
    return own.reshape([axes[axis] for axis in term.axes])
