"""Convolutions as a narrower convolution and a pointwise one behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._conv import taps
from ._linalg import low_rank
from .base import Decomposition, Factors

__all__ = ["OutputSVD"]


class OutputSVD(Decomposition):
    """``W[o, i, p, q] = sum_r u[o, r] v[r, i, p, q]``: the k x k convolution to r channels, then 1 x 1 to o.

    ``r (n + o)`` numbers in each group, n = i times the window taps. The fit is the exact optimum in the metric: the
    low-rank approximation of the responses (Zhang, Zou, He, Sun 2016, linear case).
    """

    name = "output_svd"
    summary = "convolution to r channels, then 1x1; best where the output has many more channels than it needs"
    equations = {"": "(g o) i * = u[(g o) r] v[(g r) i *]"}
    projects_outputs = True

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"r": min(axes["o"], axes["i"] * taps(axes))}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        o, n = axes["o"], axes["i"] * taps(axes)
        return [{"r": r} for r in range(multiple, (o * n - 1) // (o + n) + 1, multiple)]

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        tail = low_rank(weight, metric, axes["g"]).tail
        return [float(tail[ranks["r"]]) for ranks in lattice]

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        best, rank = low_rank(weight, metric, layout.axes["g"]), layout.axes["r"]
        u, v = best.basis[:, :, :rank], best.coordinates[:, :rank]
        root = v.norm(dim=2).sqrt()
        root = root.where(root > 0, 1.0)
        shapes = layout.shapes
        return {
            "u": (u * root[:, None]).reshape(shapes["u"]).contiguous(),
            "v": (v / root[:, :, None]).reshape(shapes["v"]).contiguous(),
        }
