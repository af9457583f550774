"""Convolutions as a pointwise, a depthwise and a pointwise one."""

from __future__ import annotations

from torch import Tensor

from ..ir import Layout, Metric
from ._canonical import CanonicalDecomposition, canonical, small_core
from ._sensitivity import uncolumned
from .base import Factors

__all__ = ["CP"]


class CP(CanonicalDecomposition):
    """``W[o, i, p, q] = sum_r a[o, r] c[r, p, q] b[r, i]``: 1 x 1 to r channels, k x k on each of them, 1 x 1 to o.

    ``r (i + k + o)`` numbers in each group, k the taps of the window (Hitchcock 1927; Lebedev, Ganin, Rakhuba,
    Oseledets, Lempitsky 2015). The start is the CP of a Tucker-2 core (Phan et al. 2020); then all factors are fitted
    in the metric by alternating least squares, and the sensitivity is lowered at 2 % more error
    (:mod:`._sensitivity`).
    """

    name = "cp"
    summary = "1x1, depthwise, 1x1; fewest multiply-adds of the chains, best for large windows and low keep"
    by_default = False
    equations = {"": "(g o) i * = a[(g o) r] c[(g r) *] b[(g r) i]"}

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        core = small_core(weight, layout, metric)
        a, b, c = core.absorbed(canonical(core.white, layout.axes["r"]))
        return uncolumned({"a": a, "b": b, "c": c}, layout)
