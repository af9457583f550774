"""Convolutions with all modes reduced, the windows too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._conv import taps, weight_axes
from ._cores import CoreDecomposition, WhiteCore, balanced
from ._quadratic import solve
from .base import Factors

__all__ = ["Tucker"]


class Tucker(CoreDecomposition):
    """``W[o, i, p, q] = sum u[o, s] core[s, r, a, c] m[p, a] n[q, c] v[r, i]`` with windows one tap shorter, a = p - 1
    and c = q - 1 (Tucker 1966; De Lathauwer, De Moor, Vandewalle 2000).

    ``i r + a c r s + o s + p a + q c`` numbers in each group, m and n shared by all. With a = p and c = q it would be
    Tucker-2. No chain of convolutions computes it, as x and y are the same for all channels. The start is a weighted
    Tucker-2 approximation, x and y the leading singular vectors of its core's windows, and the core the least-squares
    solution for them.
    """

    name = "tucker"
    summary = "all modes reduced, the windows too; saves storage only, the weight is rebuilt to run it"
    by_default = False
    storage = True
    equations = {"": "(g o) i p q = u[(g o) s] core[(g s) r a c] m[p a] n[q c] v[(g r) i]"}
    exact_at_full_rank = False

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        if "q" not in axes or "z" in axes or min(axes["p"], axes["q"]) < 2:
            return ()
        return ("",)

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {"a": max(1, axes.get("p", 1) - 1), "c": max(1, axes.get("q", 1) - 1)}

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        return {"s": min(o, i * k), "r": min(i, o * k)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        if not self.variants(axes):
            return []
        ranks = balanced(self.full_ranks(axes, variant), multiple)
        return [r for r in ranks if self.layout(axes, r, variant).params < prod(axes.values())]

    def fitted(self, layout: Layout) -> int:
        return layout.axes["s"]

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        axes, sizes, shapes = weight_axes(layout), layout.axes, layout.shapes
        found = WhiteCore(weight, axes, metric, sizes, apart=True, sweeps=2)
        x, y = _windows(found.core, sizes["a"], sizes["c"])
        basis = torch.einsum("pa,qc->pqac", x, y).flatten(2).flatten(0, 1)
        core = _projected_core(found.core, found.second, basis)
        parts = {"u": found.outer, "core": core, "m": x, "n": y, "v": found.inner}
        return {name: part.reshape(shapes[name]).contiguous() for name, part in parts.items()}


def _windows(core: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of the modes p and q of a core (g, s, r, p, q), two sweeps of HOOI."""
    x = torch.eye(core.shape[3], dtype=core.dtype)
    y = torch.eye(core.shape[4], dtype=core.dtype)
    for _ in range(3):
        narrow = core @ y
        x = torch.linalg.eigh(torch.einsum("gsrpb,gsrqb->pq", narrow, narrow)).eigenvectors[:, -a:].flip(1)
        narrow = core.mT @ x
        y = torch.linalg.eigh(torch.einsum("gsrpb,gsrqb->pq", narrow, narrow)).eigenvectors[:, -b:].flip(1)
    return x, y


def _projected_core(core: Tensor, second: Tensor | None, basis: Tensor) -> Tensor:
    """The best core (g, s, r, c) behind window factors ``basis`` (p q, c), orthonormal, in the core's metric."""
    flat = core.flatten(3)
    projected = flat @ basis
    if second is None:
        return projected
    groups, _, rank, taps = flat.shape
    lost = (flat - projected @ basis.mT).flatten(2)
    image = (lost @ second).reshape(flat.shape) @ basis
    half = (second.reshape(-1, taps) @ basis).reshape(groups, rank, taps, -1)
    gram = (half.mT @ basis).reshape(groups, rank, rank, *[basis.shape[1]] * 2).permute(0, 1, 4, 2, 3)
    gram = gram.reshape(groups, rank * basis.shape[1], -1)
    return projected + solve(gram, image.flatten(2).mT, 1e-9).mT.reshape(projected.shape)
