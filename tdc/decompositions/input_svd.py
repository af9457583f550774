"""Convolutions as a pointwise convolution and a convolution of fewer inputs behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._conv import mode_problem, taps, weight_axes
from .base import Decomposition, Factors

__all__ = ["InputSVD"]


class InputSVD(Decomposition):
    """``W[o, i, p, q] = sum_r u[o, r, p, q] v[r, i]``: 1 x 1 to r channels, then the k x k convolution.

    ``r (i + o k)`` numbers in each group, k the window taps. In the weight metric the start is the optimum, the leading
    singular vectors of the unfolding along i; in the input metric u is the least-squares solution for given v, and v is
    refined by alternating least squares (see :func:`tdc.decompositions._modes.fit_modes`).
    """

    name = "input_svd"
    summary = "1x1 to r channels, then the convolution; best where many input channels carry the same signal"
    equations = {"": "(g o) i * = u[(g o) r *] v[(g r) i]"}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"r": min(axes["i"], axes["o"] * taps(axes))}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        return [{"r": r} for r in range(multiple, (o * i * k - 1) // (i + o * k) + 1, multiple)] if k > 1 else []

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
        found = mode_problem(weight, weight_axes(layout), metric, inner=1).fit(layout.axes["r"], None)
        shapes = layout.shapes
        return {"u": found.core.reshape(shapes["u"]).contiguous(), "v": found.inner.reshape(shapes["v"]).contiguous()}
