"""Pivoted low rank: some rows (or columns) of a pointwise factor are those of an identity and not stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._conv import geometric, mode_problem, taps, weight_axes
from ._linalg import low_rank, pivoted_columns, pivoted_rows
from .base import Decomposition, Factors

__all__ = ["Pivoted"]


class Pivoted(Decomposition):
    """Low rank and Tucker-2 with their pointwise factors in pivoted form: r of the weight's own rows, and the
    coefficients of the other rows in them.

    A rank-r factorisation has r^2 numbers too many: any invertible r x r matrix can move from one factor to the other.
    They make r rows of a pointwise factor an identity, which is not stored: one gather at run time instead
    (interpolative decomposition: Cheng, Gimbutas, Martinsson, Rokhlin 2005; as a layer: PIFA, 2025). A matrix costs
    r (o + i - r) numbers then, and every rank below full is a saving. Variants ``output`` and ``input`` are the
    approximation of a linear weight that is the optimum in the metric; for convolutions ``channels_out`` is that of
    ``output_svd``, ``channels_in`` that of ``input_svd`` and ``channels`` that of ``tucker2``, with r (n + o - r),
    r (i - r + o k) and r (i - r) + k r s + (o - s) s numbers in each group.
    """

    name = "pivoted"
    summary = "pointwise factors without their identity block; every rank below full saves, for one gather at run time"
    equations = {
        "input": "o i = cols[o r] pivot(coef, order)[r i]",
        "output": "o i = pivot(coef, place)[o r] rows[r i]",
        "channels_out": "(g o) i * = pivot(coef, place)[(g o) r] rows[(g r) i *]",
        "channels_in": "(g o) i * = cols[(g o) r *] pivot(coef, order)[(g r) i]",
        "channels": "(g o) i * = pivot(coef, place)[(g o) s] core[(g s) r *] pivot(mix, order)[(g r) i]",
    }
    projects_outputs = True

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        """Of a pointwise weight the side whose gather and sum move fewer numbers: i + r at the input, 2 o at the
        output; all three of another convolution.
        """
        pair = _pair(axes)
        if taps(axes) > 1:
            return (*pair, "channels")
        return pair[:1] if axes["i"] <= 2 * axes["o"] else pair[1:]

    def same_fit(self, axes: Mapping[str, int], variant: str) -> tuple[str, ...]:
        return tuple(other for other in _pair(axes) if other != variant) if taps(axes) == 1 else ()

    def needs_input(self, variant: str) -> bool:
        return variant in ("channels_in", "channels")

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        if variant == "channels":
            return {"s": min(o, i * k), "r": min(i, o * k)}
        return {"r": min(i, o * k) if variant == "channels_in" else min(o, i * k)}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        o, i, k = axes["o"], axes["i"], taps(axes)
        full = self.full_ranks(axes, variant)
        if variant == "channels":
            outer, inner = (geometric(rank, multiple) for rank in full.values())
            points = [{"s": s, "r": r} for s in outer for r in inner]
            return [p for p in points if p["r"] * (i - p["r"]) + (k * p["r"] + o - p["s"]) * p["s"] < o * i * k]
        wide = o * k if variant == "channels_in" else i * k
        narrow = i if variant == "channels_in" else o
        return [{"r": r} for r in range(multiple, full["r"] + 1, multiple) if r * (wide + narrow - r) < o * i * k]

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        if not self.needs_input(variant):
            tail = low_rank(weight, metric, axes.get("g", 1)).tail
            return [float(tail[ranks["r"]]) for ranks in lattice]
        return mode_problem(weight, axes, metric, inner=1).errors(lattice)

    def fitted(self, layout: Layout) -> int:
        projected = "rows" in layout.rebuild.factors or taps(weight_axes(layout)) == 1
        return 0 if projected else layout.axes["r"] * taps(weight_axes(layout))

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        axes = weight_axes(layout)
        names = layout.rebuild.factors
        if "core" in names:
            parts = _fit_both(weight, axes, layout, metric)
        elif "rows" in names:
            parts = _fit_rows(weight, axes, layout, metric)
        else:
            parts = _fit_columns(weight, axes, layout, metric)
        return {name: part.reshape(layout.shapes[name]).contiguous() for name, part in parts.items()}


def _pair(axes: Mapping[str, int]) -> tuple[str, str]:
    return ("channels_in", "channels_out") if "g" in axes else ("input", "output")


def _fit_rows(weight: Tensor, axes: Mapping[str, int], layout: Layout, metric: Metric) -> Factors:
    best, rank = low_rank(weight, metric, axes.get("g", 1)), layout.axes["r"]
    pivots, coef, place = pivoted_rows(best.basis[:, :, :rank])
    return {"coef": coef, "rows": _rows(best.basis, pivots)[:, :, :rank] @ best.coordinates[:, :rank], "place": place}


def _fit_columns(weight: Tensor, axes: Mapping[str, int], layout: Layout, metric: Metric) -> Factors:
    rank = layout.axes["r"]
    if "g" in axes and taps(axes) > 1:
        found = mode_problem(weight, axes, metric, inner=1).fit(rank, None)
        pivots, coef, order = pivoted_columns(found.inner)
        cols = torch.einsum("gord,grs->gosd", found.core, _columns(found.inner, pivots))
        return {"cols": cols, "coef": coef, "order": order}
    best = low_rank(weight, metric, axes.get("g", 1))
    basis, coordinates = best.basis[:, :, :rank], best.coordinates[:, :rank]
    span = torch.linalg.qr(coordinates.mT).Q.mT
    pivots, coef, order = pivoted_columns(span)
    return {"cols": basis @ _columns(coordinates, pivots), "coef": coef, "order": order}


def _fit_both(weight: Tensor, axes: Mapping[str, int], layout: Layout, metric: Metric) -> Factors:
    found = mode_problem(weight, axes, metric, inner=1).fit(layout.axes["r"], layout.axes["s"])
    assert found.outer is not None
    rows, coef, place = pivoted_rows(found.outer)
    columns, mix, order = pivoted_columns(found.inner)
    core = torch.einsum("gts,gsrd,grc->gtcd", _rows(found.outer, rows), found.core, _columns(found.inner, columns))
    return {"coef": coef, "core": core, "mix": mix, "place": place, "order": order}


def _rows(matrix: Tensor, places: Tensor) -> Tensor:
    """The rows (g, r) of matrices (g, o, n)."""
    return matrix.gather(1, places[:, :, None].expand(-1, -1, matrix.shape[2]))


def _columns(matrix: Tensor, places: Tensor) -> Tensor:
    """The columns (g, r) of matrices (g, n, i)."""
    return matrix.gather(2, places[:, None].expand(-1, matrix.shape[1], -1))
