"""Linear layers as matrices in tensor-train form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from ..ir import Layout, Metric
from ._shapes import balanced, measured
from ._split import SplitDecomposition, Whitened, truncated
from .base import Factors

__all__ = ["TTMatrix"]

_BONDS = "rst"
_LARGEST_OF_FOUR = 1 << 22


class TTMatrix(SplitDecomposition):
    """``W[(o1 o2 o3), (i1 i2 i3)] = sum a[o1, i1, r] b[r, o2, i2, s] c[s, o3, i3]``; variant 4: with a fourth mode.

    o1 i1 r + r o2 i2 s + s o3 i3 numbers (Novikov et al. 2015). The start is the TT-SVD (Oseledets 2011) of the weight,
    in the input metric of the whitened weight; alternating least squares follow. The work grows with r s, so that it
    is seldom less than that of the dense weight.
    """

    name = "tt_matrix"
    summary = "a tensor train over split axes: saves storage at small ranks, hardly any time"
    by_default = False
    storage = True
    equations = {
        "3": "(o1 o2 o3) (i1 i2 i3) = a[o1 i1 r] b[r o2 i2 s] c[s o3 i3]",
        "4": "(o1 o2 o3 o4) (i1 i2 i3 i4) = a[o1 i1 r] b[r o2 i2 s] c[s o3 i3 t] d[t o4 i4]",
    }

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        count = int(variant)
        names = " ".join(f"{side}{k}" for side in "oi" for k in range(1, count + 1))
        return measured(names, balanced(axes["o"], count), balanced(axes["i"], count))

    def too_large(self, axes: Mapping[str, int], variant: str) -> str:
        if variant == "4" and axes["o"] * axes["i"] > _LARGEST_OF_FOUR:
            return (
                f"four modes of a {axes['o']} x {axes['i']} weight: one fit takes minutes and more than 2 GB "
                f"(at 4096 x 4096 200 s and 2.2 GB on one core)"
            )
        return ""

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes, count = self.modes(axes, variant), int(variant)
        sizes = [modes[f"o{k}"] * modes[f"i{k}"] for k in range(1, count + 1)]
        return {_BONDS[k - 1]: min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, count)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        full = self.full_ranks(axes, variant)
        return self.family(axes, variant, max(full.values()), multiple, lambda rank: dict.fromkeys(full, rank))

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        white, sizes, terms = Whitened(weight, layout, metric), layout.axes, layout.rebuild.factors
        count = len(terms)
        order = [side * count + k for k in range(count) for side in (0, 1)]
        rest, rank, factors = white.cube.permute(order).flatten(), 1, {}
        for k, (name, term) in enumerate(terms.items(), 1):
            side = sizes[f"o{k}"] * sizes[f"i{k}"]
            basis = matrix = rest.reshape(rank * side, -1)
            if k < count:
                rank = sizes[_BONDS[k - 1]]
                basis, rest = truncated(matrix, rank)
            cube = basis.reshape([sizes[axis] for axis in term.axes])
            factors[name] = white.plain(cube, f"i{k}", term.axes.index(f"i{k}"))
        name = next(reversed(factors))
        return {**factors, name: factors[name] * white.scale}
