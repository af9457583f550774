"""Linear layers as matrices in hierarchical Tucker form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._shapes import balanced, measured
from ._split import SplitDecomposition, Whitened, leading, truncated
from .base import Factors

__all__ = ["HierarchicalTucker"]

_LEAVES = {"u": "a", "v": "h", "w": "c", "y": "d"}


class HierarchicalTucker(SplitDecomposition):
    """``W = sum u[o1, i1, a] v[o2, i2, h] w[o3, i3, c] y[o4, i4, d] s[a, h, e] t[c, d, e]``, a balanced tree.

    Four leaves, two nodes and the root, which is part of the last node: (o1 i1) a + ... + a h e + c d e numbers. The
    start is the hierarchical SVD (Grasedyck 2010), in the input metric of the whitened weight; alternating least
    squares follow. The lattice has e = a h / 4: the middle of the tree is what needs ranks.
    """

    name = "hierarchical_tucker"
    summary = "a tree of small factors over split axes: saves storage at small ranks, no time"
    by_default = False
    storage = True
    equations = {
        "": "(o1 o2 o3 o4) (i1 i2 i3 i4) = u[o1 i1 a] v[o2 i2 h] w[o3 i3 c] y[o4 i4 d] s[a h e] t[c d e]",
    }

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return measured("o1 o2 o3 o4 i1 i2 i3 i4", balanced(axes["o"], 4), balanced(axes["i"], 4))

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes = self.modes(axes, variant)
        sizes = [modes[f"o{k}"] * modes[f"i{k}"] for k in (1, 2, 3, 4)]
        a, h, c, d = (min(size, prod(sizes) // size) for size in sizes)
        return {"a": a, "h": h, "c": c, "d": d, "e": min(a * h, c * d)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        def ranks(middle: int) -> dict[str, int]:
            return {**dict.fromkeys("ahcd", max(multiple, isqrt(4 * middle))), "e": middle}

        return self.family(axes, variant, self.full_ranks(axes, variant)["e"], multiple, ranks)

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        white, sizes = Whitened(weight, layout, metric), layout.axes
        core = white.cube.permute(0, 4, 1, 5, 2, 6, 3, 7)
        core = core.reshape([sizes[f"o{k}"] * sizes[f"i{k}"] for k in (1, 2, 3, 4)])
        factors = {}
        bases = [leading(_gram(core, k), sizes[rank]) for k, rank in enumerate(_LEAVES.values())]
        for k, (name, basis) in enumerate(zip(_LEAVES, bases, strict=True)):
            core = (core.movedim(k, -1) @ basis).movedim(-1, k)
            factors[name] = white.plain(basis.reshape(sizes[f"o{k + 1}"], sizes[f"i{k + 1}"], -1), f"i{k + 1}", 1)
        a, h, c, d = core.shape
        basis, coordinates = truncated(core.reshape(a * h, c * d), sizes["e"])
        missing = sizes["e"] - basis.shape[1]
        factors["s"] = torch.nn.functional.pad(basis, (0, missing)).reshape(a, h, -1)
        factors["t"] = torch.nn.functional.pad(coordinates.mT, (0, missing)).reshape(c, d, -1) * white.scale
        return {name: part.contiguous() for name, part in factors.items()}


def _gram(core: Tensor, place: int) -> Tensor:
    rows = core.movedim(place, 0).flatten(1)
    return rows @ rows.mT
