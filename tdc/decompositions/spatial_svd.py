"""Convolutions as two with thinner windows, one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._conv import mode_problem, taps, weight_axes
from .base import Decomposition, Factors

__all__ = ["SpatialSVD"]


class SpatialSVD(Decomposition):
    """``W[o, i, p, q] = sum_r u[o, r, q] v[r, i, p]``: k x 1 to r channels, then 1 x k (3-D: k x 1 x 1, 1 x k x k).

    ``r (i p + o q)`` numbers in each group (Jaderberg, Vedaldi, Zisserman 2014, scheme 2). In the weight metric the fit
    is an exact SVD of the weight as a matrix (o q, i p); in the input metric u is the least-squares solution for given
    v, and v is refined by alternating least squares.
    """

    name = "spatial_svd"
    summary = "k x 1, then 1 x k; best for large windows and few channels"
    equations = {"": "(g o) i * = u[(g o) r q] v[(g r) i p]", "volume": "(g o) i * = u[(g o) r q z] v[(g r) i p]"}

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        """One for images and one for volumes; none where fewer than two window axes have more than one tap."""
        if axes.get("p", 1) < 2 or axes.get("q", 1) * axes.get("z", 1) < 2:
            return ()
        return ("volume",) if "z" in axes else ("",)

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        inner, outer = _sides(axes)
        return {"r": min(inner, outer)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        inner, outer = _sides(axes)
        return [{"r": r} for r in range(multiple, (inner * outer - 1) // (inner + outer) + 1, multiple)]

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        return mode_problem(weight, axes, metric, inner=2).errors(lattice)

    def fitted(self, layout: Layout) -> int:
        return layout.axes["r"] * (taps(weight_axes(layout)) // layout.axes["p"])

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        found = mode_problem(weight, weight_axes(layout), metric, inner=2).fit(layout.axes["r"], None)
        shapes = layout.shapes
        return {"u": found.core.reshape(shapes["u"]).contiguous(), "v": found.inner.reshape(shapes["v"]).contiguous()}


def _sides(axes: Mapping[str, int]) -> tuple[int, int]:
    """Length of the input side (i p) and of the output side (o q, in 3-D o q z)."""
    return axes["i"] * axes["p"], axes["o"] * (taps(axes) // axes["p"])
