"""Low rank by singular value decomposition in the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import low_rank
from .base import Decomposition, Factors

__all__ = ["SVD"]


class SVD(Decomposition):
    """``W[o, i] = sum_r u[o, r] v[r, i]`` with r (o + i) numbers: two thin products instead of one.

    The fit is the exact optimum in the metric (Eckart and Young 1936; in the input metric DRONE, Chen et al. 2021). The
    scale of each rank-one term is split evenly between its two factors, which suits half precision.
    """

    name = "svd"
    summary = "two thin products; saves below the break-even rank o i / (o + i)"
    equations = {"": "o i = u[o r] v[r i]"}
    projects_outputs = True

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"r": min(axes["o"], axes["i"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        o, i = axes["o"], axes["i"]
        below_break_even = (o * i - 1) // (o + i)
        return [{"r": r} for r in range(multiple, below_break_even + 1, multiple)]

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        tail = low_rank(weight, metric).tail
        return [float(tail[ranks["r"]]) for ranks in lattice]

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        best, rank = low_rank(weight, metric), layout.axes["r"]
        u, v = best.basis[0, :, :rank], best.coordinates[0, :rank]
        root = v.norm(dim=1).sqrt()
        root = root.where(root > 0, 1.0)
        return {"u": (u * root).contiguous(), "v": (v / root[:, None]).contiguous()}
