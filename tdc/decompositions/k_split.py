"""Linear layers with their inputs in equal slices, each of low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import low_rank, power_of_two
from ._split import SplitDecomposition, singular_squares
from .base import Factors

__all__ = ["KSplit"]


class KSplit(SplitDecomposition):
    """``W[o, (k c)] = sum_r a[o, k, r] b[k, r, c]``: k slices of c inputs, each of rank r; r (o k + i) numbers.

    ALDS (Liebenwein et al. 2021). The best fit is the SVD of every slice, in the input metric with the second moment
    within the slice; the decoder is then refitted in the whole second moment, and both by alternating least squares.
    Variants: the number of slices, which has to divide the inputs. The run is one product batched over slices, then a
    dense one.
    """

    name = "k_split"
    summary = "inputs in slices of low rank: helps where parts of the input are used in different ways"
    by_default = False
    equations = dict.fromkeys(("2", "4", "8"), "o (k c) = a[o k r] b[k r c]")
    optimal_start = True

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        count, inputs = int(variant), axes["i"]
        return {"k": count, "c": inputs // count} if inputs % count == 0 and inputs > count else {}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"r": min(axes["o"], self.modes(axes, variant)["c"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        stored = axes["o"] * int(variant) + axes["i"]
        highest = min((axes["o"] * axes["i"] - 1) // stored, *self.full_ranks(axes, variant).values())
        return self.family(axes, variant, highest, multiple, lambda r: {"r": r})

    def squares(self, weight: Tensor, axes: Mapping[str, int], variant: str) -> Tensor:
        slices = weight.reshape(axes["o"], int(variant), -1).transpose(0, 1)
        return singular_squares(slices).sum(0)

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        count, width, rank = (layout.axes[axis] for axis in ("k", "c", "r"))
        rows = weight.reshape(-1, count, width).transpose(0, 1).reshape(-1, width)
        second = None
        if metric.second_moment is not None:
            whole = metric.second_moment / power_of_two(metric.second_moment.diagonal(dim1=-2, dim2=-1))
            blocks = whole.reshape(count, width, count, width).diagonal(dim1=0, dim2=2)
            second = blocks.permute(2, 0, 1).contiguous()
        best = low_rank(rows, Metric(metric.name, second), groups=count)
        a = best.basis[..., :rank].permute(1, 0, 2)
        return {"a": a.contiguous(), "b": best.coordinates[:, :rank].contiguous()}
