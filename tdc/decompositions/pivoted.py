"""Pivoted low rank: some rows (or columns) of the approximation are stored as they are, the others as combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir import Layout, Metric, OpKind
from ._linalg import low_rank, pivot_rows
from .base import Decomposition, Factors

__all__ = ["Pivoted"]


class Pivoted(Decomposition):
    """A rank-r weight as r of its own rows, and the coefficients of the other rows in them: r (o + i - r) numbers.

    Variant ``output``: ``W[p] = rows``, ``W[q] = coef @ rows``; variant ``input``, the same of the transposed weight:
    ``W[:, p] = cols``, ``W[:, q] = cols @ coef``. Every rank below full is a saving: at full rank the count is that
    of the dense weight (interpolative decomposition: Cheng, Gimbutas, Martinsson, Rokhlin 2005; as a layer: PIFA,
    2025). The approximation is the one of ``svd`` at the same rank, the optimum in the metric, written in another
    basis.
    """

    name = "pivoted"
    summary = "low rank at r (o + i - r) numbers; every rank below full saves, for one gather at run time"
    kinds = frozenset({OpKind.LINEAR})
    equations = {
        "input": "o i = cols[o p] | cols[o p] coef[p q] over i = p q by order",
        "output": "o i = rows[p i] | coef[q p] rows[p i] over o = p q at place",
    }

    def variant(self, axes: Mapping[str, int]) -> str:
        """The side whose gather and sum move fewer numbers: i + p at the input, 2 o at the output."""
        return "input" if axes["i"] <= 2 * axes["o"] else "output"

    def sizes(self, variant: str, axes: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
        rank, split = ranks["r"], axes["i"] if variant == "input" else axes["o"]
        return {"o": axes["o"], "i": axes["i"], "p": rank, "q": split - rank}

    def full_ranks(self, axes: Mapping[str, int]) -> dict[str, int]:
        return {"r": min(axes["o"], axes["i"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int) -> Sequence[dict[str, int]]:
        return [{"r": r} for r in range(multiple, min(axes["o"], axes["i"]), multiple)]

    def errors(self, weight: Tensor, metric: Metric, lattice: Sequence[Mapping[str, int]]) -> list[float]:
        tail = low_rank(weight, metric).tail
        return [float(tail[ranks["r"]]) for ranks in lattice]

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        best, rank = low_rank(weight, metric), layout.axes["p"]
        basis, coordinates = best.basis[:, :rank], best.coordinates[:rank]
        if "rows" in layout.rebuild.factors:
            pivots, others = pivot_rows(basis)
            coef = torch.linalg.solve(basis[pivots].T, basis[others].T).T
            place = torch.argsort(torch.cat([pivots, others])).to(torch.int32)
            return {"rows": basis[pivots] @ coordinates, "coef": coef.contiguous(), "place": place}
        span, _ = torch.linalg.qr(coordinates.T)
        pivots, others = pivot_rows(span)
        coef = torch.linalg.solve(span[pivots].T, span[others].T)
        order = torch.cat([pivots, others]).to(torch.int32)
        return {"cols": basis @ coordinates[:, pivots], "coef": coef, "order": order}
