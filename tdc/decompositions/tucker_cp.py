"""Convolutions as pointwise ones around a depthwise one: CP of a Tucker-2 core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from ..ir import Layout, Metric
from ._canonical import canonical
from ._conv import taps, weight_axes
from ._cores import CoreDecomposition, WhiteCore, balanced
from .base import Factors

__all__ = ["TuckerCP"]


class TuckerCP(CoreDecomposition):
    """``W[o, i, p, q] = sum u[o, s] a[s, r] c[r, p, q] b[r, m] v[m, i]``: 1 x 1 to m and to r channels, k x k on each
    of these, 1 x 1 to s and to o.

    ``i m + m r + k r + r s + s o`` numbers in each group (Phan et al. 2020, TKD-CPD): a CP of rank r whose channel
    factors have the ranks s and m. The start is the CP of the core of a weighted Tucker-2 approximation, its modes
    whitened; then the factors are fitted in the metric, a and b only where they are small
    (:class:`._cores.CoreDecomposition`).
    """

    name = "tucker_cp"
    summary = "1x1, 1x1, depthwise, 1x1, 1x1; CP with fewer numbers where its rank exceeds the channels' ranks"
    by_default = False
    equations = {"": "(g o) i * = u[(g o) s] a[(g s) r] c[(g r) *] b[(g r) m] v[(g m) i]"}
    exact_at_full_rank = False

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        return super().variants(axes) if taps(axes) > 1 else ()

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        """The channels, and the rank at which CP alone stores as much as dense."""
        o, i, k = axes["o"], axes["i"], taps(axes)
        return {"s": min(o, i * k), "r": max(1, o * i * k // (o + i + k)), "m": min(i, o * k)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        if not self.variants(axes):
            return []
        ranks = balanced(self.full_ranks(axes, variant), multiple)
        return [r for r in ranks if self.layout(axes, r, variant).params < prod(axes.values())]

    def fitted(self, layout: Layout) -> int:
        return layout.axes["s"]

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        axes, sizes, shapes = weight_axes(layout), layout.axes, layout.shapes
        core = WhiteCore(weight, axes, metric, {"s": sizes["s"], "r": sizes["m"]}, apart=False, sweeps=1)
        a, b, c = canonical(core.white, sizes["r"])
        b, c = core.plain(b, 1, 0).mT, core.plain(c, 1, 1).mT
        parts = {"u": core.outer, "a": a, "c": c, "b": b, "v": core.inner}
        return {name: part.reshape(shapes[name]).contiguous() for name, part in parts.items()}
