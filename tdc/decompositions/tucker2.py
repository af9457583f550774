"""Convolutions between two pointwise ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._conv import geometric, mode_problem, taps, weight_axes
from .base import Decomposition, Factors

__all__ = ["Tucker2"]


class Tucker2(Decomposition):
    """``W[o, i, p, q] = sum_{s, r} u[o, s] core[s, r, p, q] v[r, i]``: 1 x 1 to r, k x k to s, 1 x 1 to o channels.

    ``i r + k r s + o s`` numbers in each group (Tucker 1966 over the two channel modes; Kim et al. 2016). In the input
    metric u and the core are closed-form solutions for given v (least squares, then reduced-rank regression), and v is
    refined by alternating least squares, monotone; the start is taken from channel covariance and weight together
    (Kalle et al. 2025 alternate over three blocks).
    """

    name = "tucker2"
    summary = "1x1, convolution, 1x1; best for wide convolutions at low keep"
    equations = {"": "(g o) i * = u[(g o) s] core[(g s) r *] v[(g r) i]"}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        return {"s": min(o, i * k), "r": min(i, o * k)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        if k == 1:
            return []
        outer, inner = (geometric(full, multiple) for full in self.full_ranks(axes, variant).values())
        return [{"s": s, "r": r} for s in outer for r in inner if i * r + k * r * s + o * s < o * i * k]

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        return mode_problem(weight, axes, metric, inner=1).errors(lattice)

    def fitted(self, layout: Layout) -> int:
        return layout.axes["r"] * taps(weight_axes(layout))

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        found = mode_problem(weight, weight_axes(layout), metric, inner=1).fit(layout.axes["r"], layout.axes["s"])
        assert found.outer is not None
        parts = {"u": found.outer, "core": found.core, "v": found.inner}
        return {name: part.reshape(layout.shapes[name]).contiguous() for name, part in parts.items()}
