"""Linear layers as matrices in tensor-ring form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._shapes import balanced, measured
from ._split import SplitDecomposition, Whitened, truncated
from .base import Factors

__all__ = ["Ring"]


class Ring(SplitDecomposition):
    """``W[(o1 o2 o3), (i1 i2 i3)] = sum a[t, o1, i1, r] b[r, o2, i2, s] c[s, o3, i3, t]``.

    t o1 i1 r + r o2 i2 s + s o3 i3 t numbers (Zhao et al. 2016). The start is their TR-SVD: a first SVD, its rank split
    into t x r, and a second one; in the input metric of the whitened weight. Alternating least squares follow. There
    is no closed form, and no ranks of which it is known that they always suffice.
    """

    name = "ring"
    summary = "a tensor ring over split axes: saves storage at small ranks, hardly any time"
    by_default = False
    storage = True
    equations = {"": "(o1 o2 o3) (i1 i2 i3) = a[t o1 i1 r] b[r o2 i2 s] c[s o3 i3 t]"}
    exact_at_full_rank = False

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return measured("o1 o2 o3 i1 i2 i3", balanced(axes["o"], 3), balanced(axes["i"], 3))

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes = self.modes(axes, variant)
        first, second, third = (modes[f"o{k}"] * modes[f"i{k}"] for k in (1, 2, 3))
        side = isqrt(min(first, second * third))
        return {"t": side, "r": side, "s": min(side * second, side * third)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        full = self.full_ranks(axes, variant)
        return self.family(axes, variant, max(full.values()), multiple, lambda rank: dict.fromkeys(full, rank))

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        white, sizes = Whitened(weight, layout, metric), layout.axes
        first, second, third = (sizes[f"o{k}"] * sizes[f"i{k}"] for k in (1, 2, 3))
        t, r, s = sizes["t"], sizes["r"], sizes["s"]
        basis, rest = truncated(white.cube.permute(0, 3, 1, 4, 2, 5).reshape(first, -1), t * r)
        a = basis.reshape(sizes["o1"], sizes["i1"], t, r).permute(2, 0, 1, 3)
        rest = rest.reshape(t, r, second, third).permute(1, 2, 3, 0).reshape(r * second, third * t)
        found, coordinates = truncated(rest, s)
        missing = s - found.shape[1]
        b = torch.nn.functional.pad(found, (0, missing)).reshape(r, sizes["o2"], sizes["i2"], s)
        c = torch.nn.functional.pad(coordinates, (0, 0, 0, missing)).reshape(s, sizes["o3"], sizes["i3"], t)
        return {
            "a": white.plain(a, "i1", 2).contiguous(),
            "b": white.plain(b, "i2", 2).contiguous(),
            "c": white.plain(c, "i3", 2).contiguous() * white.scale,
        }
