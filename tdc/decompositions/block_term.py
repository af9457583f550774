"""Convolutions as a grouped one between two pointwise ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._conv import taps, weight_axes
from ._cores import CoreDecomposition, WhiteCore, balanced
from ._modes import ModeFit, fit_modes
from .base import Factors

__all__ = ["BlockTerm"]

_WORK = 20_000_000_000
_LEAST_GAIN = 1e-3


class BlockTerm(CoreDecomposition):
    """``W[o, i, p, q] = sum_h sum_sr u[o, (h s)] core[h, s, r, p, q] v[(h r), i]``: 1 x 1 to h r channels, a
    convolution in h groups, 1 x 1 from h s to o channels.

    ``i h r + k h r s + o h s`` numbers in each group: a sum of h Tucker-2 terms (De Lathauwer 2008), a Tucker-2 core of
    h blocks. The variant is the number of blocks. The start takes the core of a weighted Tucker-2 approximation and
    fits its blocks in turn to what the others leave; then the factors are fitted in the metric, the blocks only where
    they are small (:class:`._cores.CoreDecomposition`).
    """

    name = "block_term"
    summary = "1x1, grouped convolution, 1x1; best for wide convolutions where grouped ones are fast"
    by_default = False
    equations = dict.fromkeys(("2", "4", "8"), "(g o) i * = u[(g o) (h s)] core[(g h s) r *] v[(g h r) i]")
    exact_at_full_rank = False

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        """Those whose blocks have at least one channel on either side."""
        if taps(axes) == 1:
            return ()
        return tuple(v for v in super().variants(axes) if int(v) <= min(axes["o"], axes["i"]))

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"h": int(variant)}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        """Those with as many channels in all blocks together as the weight has."""
        blocks = int(variant)
        return {"s": max(1, axes["o"] // blocks), "r": max(1, axes["i"] // blocks)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        if variant not in self.variants(axes):
            return []
        ranks = balanced(self.full_ranks(axes, variant), multiple)
        return [r for r in ranks if self.layout(axes, r, variant).params < prod(axes.values())]

    def fitted(self, layout: Layout) -> int:
        return layout.axes["h"] * layout.axes["s"]

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        axes, shapes = weight_axes(layout), layout.shapes
        blocks, s, r = (layout.axes[axis] for axis in ("h", "s", "r"))
        outer, inner = min(axes["o"], blocks * s), min(axes["i"], blocks * r)
        core = WhiteCore(weight, axes, metric, {"s": outer, "r": inner}, apart=False, sweeps=1)
        found = _blocks(core.white, blocks, s, r)
        outers = [f.outer for f in found if f.outer is not None]
        windows = core.plain(torch.stack([f.core for f in found], 1), 4, 1)
        inners = core.plain(torch.stack([f.inner for f in found], 1), 3, 0)
        parts = {"u": core.outer @ torch.cat(outers, 2), "core": windows, "v": inners @ core.inner[:, None]}
        return {name: part.reshape(shapes[name]).contiguous() for name, part in parts.items()}


def _blocks(core: Tensor, blocks: int, outputs: int, rank: int) -> list[ModeFit]:
    """Tucker-2 terms whose sum is near a core (g, s, r, d), each fitted to what the others leave.

    As many rounds as ``_WORK`` multiply-adds allow, at least two; the best one is kept.
    """
    work = blocks * core.numel() * core.shape[2]
    terms = [torch.zeros_like(core) for _ in range(blocks)]
    found: list[ModeFit | None] = [None] * blocks
    rest, least = core, float("inf")
    best: list[ModeFit] = []
    for _ in range(min(60, max(2, _WORK // work))):
        for k in range(blocks):
            target = rest + terms[k]
            fit = fit_modes(target, None, rank, outputs, sweeps=2)
            assert fit.outer is not None
            terms[k] = torch.einsum("gts,gsrd,gra->gtad", fit.outer, fit.core, fit.inner)
            found[k], rest = fit, target - terms[k]
        error = float(rest.square().sum())
        gain = least - error
        if gain > 0:
            least, best = error, [f for f in found if f is not None]
        if gain <= _LEAST_GAIN * error:
            break
    return best
