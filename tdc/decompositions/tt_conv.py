"""Convolutions as trains: pointwise, k x 1, 1 x k and pointwise; and over split channels, for storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._conv import taps, weight_axes
from ._cores import CoreDecomposition, WhiteCore, balanced
from ._linalg import power_of_two
from ._modes import fit_modes
from .base import Factors

__all__ = ["TTConv"]


class TTConv(CoreDecomposition):
    """``W[o, i, p, q] = sum_srl u[o, s] w[s, l, q] h[l, r, p] v[r, i]``: 1 x 1, k x 1, 1 x k, 1 x 1.

    ``i r + r p l + l q s + s o`` numbers in each group: the tensor train of the modes i, p, q, o (Oseledets 2011). The
    start is a weighted Tucker-2 approximation, whose core (s q, r p) is then split in its own metric (:mod:`._modes`).
    After that all factors are fitted in the metric but very large ones (:class:`._cores.CoreDecomposition`).

    ``matricised``: ``W = sum_r a[p, q, o1, i1, r] c[r, o2, i2]`` of channels split in two, o = o1 o2 and i = i1 i2,
    without groups: the train of Garipov, Podoprikhin, Novikov, Vetrov (2016) for two pairs, its first rank, at most the
    taps of the window, not reduced. It saves storage only. The start is the SVD.
    """

    name = "tt_conv"
    summary = "1x1, k x 1, 1 x k, 1x1; thin windows at low keep (matricised: saves storage only)"
    by_default = False
    storage = True
    equations = {
        "": "(g o) i p q = u[(g o) s] w[(g s) l q] h[(g l) r p] v[(g r) i]",
        "matricised": "(g o1 o2) (i1 i2) p q = a[g p q o1 i1 r] c[r o2 i2]",
    }

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        """For images: with two window axes of more than one tap; split, with divisors of both channels."""
        if "q" not in axes or "z" in axes or min(axes["p"], axes["q"]) < 2:
            return ()
        split = min(_split(axes["o"]), _split(axes["i"])) > 1 and axes["g"] == 1
        return ("", "matricised") if split else ("",)

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        if variant != "matricised":
            return {}
        o1, i2 = _split(axes["o"]), _split(axes["i"])
        return {"o1": o1, "o2": axes["o"] // o1, "i1": axes["i"] // i2, "i2": i2}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        if variant == "matricised":
            sizes = self.modes(axes, variant)
            return {"r": min(k * sizes["o1"] * sizes["i1"], sizes["o2"] * sizes["i2"])}
        q = axes.get("q", 1)
        return {"s": min(o, i * k), "l": min(i * axes["p"], o * q), "r": min(i, o * k)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        """The middle rank at half its share: it costs most."""
        if not self.variants(axes):
            return []
        full = self.full_ranks(axes, variant)
        shares: dict[str, float] = {axis: size / 2 if axis == "l" else size for axis, size in full.items()}
        ranks = balanced(shares, multiple)
        return [r for r in ranks if self.layout(axes, r, variant).params < prod(axes.values())]

    def fitted(self, layout: Layout) -> int:
        return layout.axes.get("s", 0)

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        if "s" not in layout.axes:
            return _pair(weight, layout)
        axes, ranks, shapes = weight_axes(layout), layout.axes, layout.shapes
        core = WhiteCore(weight, axes, metric, ranks, apart=True, sweeps=2)
        modes = core.core.flatten(2, 3)
        reach = min(ranks["l"], modes.shape[2])
        found = fit_modes(modes, core.second, reach, None, sweeps=2)
        missing = ranks["l"] - reach  # more than its neighbours can fill
        middle = torch.nn.functional.pad(found.core, (0, 0, 0, missing))
        inner = torch.nn.functional.pad(found.inner, (0, 0, 0, missing))
        parts = {"u": core.outer, "w": middle, "h": inner, "v": core.inner}
        return {name: part.reshape(shapes[name]).contiguous() for name, part in parts.items()}


def _split(size: int) -> int:
    """The largest divisor that is at most the square root."""
    return next(n for n in range(isqrt(size), 0, -1) if size % n == 0)


def _pair(weight: Tensor, layout: Layout) -> Factors:
    """The SVD of the weight as a matrix (p q o1 i1, o2 i2)."""
    sizes, shapes = layout.axes, layout.shapes
    scale, rank = power_of_two(weight), sizes["r"]
    cube = (weight / scale).reshape(*(sizes[axis] for axis in ("o1", "o2", "i1", "i2")), -1).permute(4, 0, 2, 1, 3)
    left, values, right = torch.linalg.svd(cube.flatten(3).flatten(0, 2), full_matrices=False)
    root = values[:rank].sqrt()
    parts = {"a": left[:, :rank] * root * scale, "c": root[:, None] * right[:rank]}
    return {name: part.reshape(shapes[name]).contiguous() for name, part in parts.items()}
