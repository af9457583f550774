"""Linear layers as a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._shapes import balanced, led, measured
from ._split import SplitDecomposition, Whitened, cube, singular_squares, truncated
from .base import Factors

__all__ = ["Kronecker"]

_FIRST = {"4x": 4, "16x": 16}


class Kronecker(SplitDecomposition):
    """``W = sum_k A_k x B_k``, A_k (o1, i1), B_k (o2, i2): k (o1 i1 + o2 i2) numbers.

    Its best fit is the SVD of the weight rearranged to (o1 i1, o2 i2) (Van Loan and Pitsianis 1993), in the input
    metric of the whitened weight; alternating least squares follow. Variants: ``balanced`` sizes, and a first factor
    of 4 x 4 or 16 x 16 blocks. The run multiplies by every B_k, then by every A_k and sums.
    """

    name = "kronecker"
    summary = "a sum of Kronecker products: very few parameters, and little work where the sum is short"
    by_default = False
    storage = True
    equations = dict.fromkeys(("balanced", *_FIRST), "(o1 o2) (i1 i2) = a[k o1 i1] b[k o2 i2]")
    optimal_start = True

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        first = _FIRST.get(variant)
        sides = [balanced(axes[axis], 2) if first is None else led(axes[axis], first) for axis in ("o", "i")]
        return measured("o1 o2 i1 i2", *sides)

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes = self.modes(axes, variant)
        return {"k": min(modes["o1"] * modes["i1"], modes["o2"] * modes["i2"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        modes = self.modes(axes, variant)
        stored = modes["o1"] * modes["i1"] + modes["o2"] * modes["i2"]
        highest = min((axes["o"] * axes["i"] - 1) // stored, *self.full_ranks(axes, variant).values())
        return self.family(axes, variant, highest, multiple, lambda k: {"k": k})

    def squares(self, weight: Tensor, axes: Mapping[str, int], variant: str) -> Tensor:
        return singular_squares(_rearranged(cube(weight, self.layout(axes, {"k": 1}, variant))))

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        white, sizes = Whitened(weight, layout, metric), layout.axes
        basis, coordinates = truncated(_rearranged(white.cube), sizes["k"])
        a = white.plain(basis.mT.reshape(-1, sizes["o1"], sizes["i1"]), "i1", 2)
        b = white.plain(coordinates.reshape(-1, sizes["o2"], sizes["i2"]), "i2", 2)
        return {"a": a, "b": b * white.scale}


def _rearranged(cube: Tensor) -> Tensor:
    """(o1, o2, i1, i2) as (o1 i1, o2 i2)."""
    return cube.permute(0, 2, 1, 3).reshape(cube.shape[0] * cube.shape[2], -1)
