"""Convolutions as pointwise, k x 1 and 1 x k depthwise, and pointwise ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from ._canonical import CanonicalDecomposition, canonical, small_core
from ._sensitivity import uncolumned
from ._trains import split_columns, tensor_train, train_to_factors
from .base import Factors

__all__ = ["CP4"]

_LARGEST_TRAIN = 128
"""Trains of higher ranks are not tried: their cores have the rank squared times the taps of entries."""


class CP4(CanonicalDecomposition):
    """``W[o, i, p, q] = sum_r a[o, r] d[r, q] c[r, p] b[r, i]``: 1 x 1 to r channels, k x 1 and 1 x k on each of them,
    1 x 1 to o.

    ``r (i + p + q + o)`` numbers in each group (Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky 2015). It starts from the
    better of two CPs of a Tucker-2 core: from a train of coupled CPs (:mod:`._trains`), and from a CP of order three
    whose windows are replaced by the nearest separable ones. Then as :class:`.cp.CP`.
    """

    name = "cp4"
    summary = "1x1, depthwise k x 1 and 1 x k, 1x1; for large windows, where cp has too many multiply-adds"
    by_default = False
    equations = {"": "(g o) i p q = a[(g o) r] d[(g r) q] c[(g r) p] b[(g r) i]"}

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        if "q" not in axes or "z" in axes or min(axes["p"], axes["q"]) < 2:
            return ()
        return super().variants(axes)

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        return super().rank_lattice(axes, multiple, variant) if self.variants(axes) else []

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        core, rank = small_core(weight, layout, metric, apart=True), layout.axes["r"]
        white = core.white
        outer, inner, window = canonical(white.flatten(3), rank)
        starts = [[outer, inner, *split_columns(window, white.shape[3])]]
        if rank <= _LARGEST_TRAIN:
            starts.append(_from_train(white, rank))
        a, b, c, d = core.absorbed(canonical(white, rank, starts))
        return uncolumned({"a": a, "b": b, "c": c, "d": d}, layout)


def _from_train(core: Tensor, rank: int) -> list[Tensor]:
    """The factors of the modes s, r, p, q from the train over s, p, q, r."""
    cores = tensor_train(core.permute(0, 1, 3, 4, 2), rank)
    mixing, second, ahead = canonical(cores[1], rank)
    s, p, q, r = train_to_factors(cores, (mixing, second, ahead))
    return [s, r, p, q]
