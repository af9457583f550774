"""Linear layers as a sum of Kronecker products beside a low-rank matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import energy, low_rank, power_of_two
from ._shapes import balanced, measured
from ._split import SplitDecomposition, Whitened, leading, truncated
from .base import Factors

__all__ = ["Residual"]

_SHARE = 8
_ROUNDS = 3
_BIG = 1 << 22


class Residual(SplitDecomposition):
    """``W = sum_k A_k x B_k + U V``: k (o1 i1 + o2 i2) + r (o + i) numbers.

    Where a weight has a regular part and a few directions of its own. The start alternates between the SVD of what the
    Kronecker products leave, in the metric, and the Kronecker products of what the SVD leaves (Van Loan and Pitsianis
    1993); alternating least squares over all four factors follow. The lattice has one such product per eight ranks.
    """

    name = "residual"
    summary = "Kronecker products beside a low-rank term: saves storage where neither is enough"
    by_default = False
    storage = True
    equations = {"": "(o1 o2) (i1 i2) = a[k o1 i1] b[k o2 i2] + u[o1 o2 r] v[r i1 i2]"}

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return measured("o1 o2 i1 i2", balanced(axes["o"], 2), balanced(axes["i"], 2))

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes = self.modes(axes, variant)
        return {"k": min(modes["o1"] * modes["i1"], modes["o2"] * modes["i2"]), "r": min(axes["o"], axes["i"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        highest = (axes["o"] * axes["i"] - 1) // (axes["o"] + axes["i"])
        return self.family(axes, variant, highest, multiple, lambda r: {"k": max(multiple, r // _SHARE), "r": r})

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        rank, scale = layout.axes["r"], power_of_two(weight)
        known = low_rank(weight, metric)
        pair = known.basis[0, :, :rank], known.coordinates[0, :rank] / scale
        weight = weight / scale
        rest, best, least = weight, Factors(), float("inf")
        for turn in range(_ROUNDS if weight.numel() <= _BIG else 1):
            pair = _low_rank(rest, rank, metric) if turn else pair
            base = _kronecker(weight - pair[0] @ pair[1], layout, metric)
            rest = weight - _product(base, layout)
            lost = energy((rest - pair[0] @ pair[1])[None], metric)
            if lost < least:
                best, least = {**base, **_bordered(*pair, layout)}, lost
        return {name: part * scale if name in ("a", "u") else part for name, part in best.items()}


def _kronecker(rest: Tensor, layout: Layout, metric: Metric) -> Factors:
    """Kronecker products for what is left of the weight, best in the Kronecker product of the marginals."""
    white, sizes = Whitened(rest, layout, metric), layout.axes
    matrix = white.cube.permute(0, 2, 1, 3).reshape(sizes["o1"] * sizes["i1"], -1)
    basis, coordinates = truncated(matrix, sizes["k"])
    a = white.plain(basis.mT.reshape(-1, sizes["o1"], sizes["i1"]), "i1", 2)
    b = white.plain(coordinates.reshape(-1, sizes["o2"], sizes["i2"]), "i2", 2)
    return {"a": a * white.scale, "b": b}


def _product(base: Factors, layout: Layout) -> Tensor:
    sizes = layout.axes
    whole = torch.einsum("kab,kcd->acbd", base["a"], base["b"])
    return whole.reshape(sizes["o1"] * sizes["o2"], -1)[: sizes["o"], : sizes["i"]]


def _low_rank(rest: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """The best ``u v`` in the metric, u with orthonormal columns."""
    outer, inner = torch.linalg.qr(rest) if rest.shape[0] > rest.shape[1] else (None, rest)
    second = metric.second_moment
    image = inner if second is None else inner @ (second / power_of_two(second.diagonal()))
    basis = leading(image @ inner.mT, rank)
    return basis if outer is None else outer @ basis, basis.mT @ inner


def _bordered(u: Tensor, v: Tensor, layout: Layout) -> Factors:
    """``u`` and ``v`` with zeros up to the composite sizes, in the shapes of the layout."""
    sizes, shapes = layout.axes, layout.shapes
    rows, columns = sizes["o1"] * sizes["o2"] - sizes["o"], sizes["i1"] * sizes["i2"] - sizes["i"]
    u = torch.nn.functional.pad(u, (0, 0, 0, rows)).reshape(shapes["u"])
    return {"u": u, "v": torch.nn.functional.pad(v, (0, columns)).reshape(shapes["v"])}
