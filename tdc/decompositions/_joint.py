"""One decomposition for several weights that read the same input: they stand one above the other.

With ``W = [W_1; W_2; ...]`` a layout of W is one of each weight, ``W_k = A_k B``, with the same factors without
outputs, B, and its own rows A_k of the one that holds the outputs. For low rank the optimum is that of W in the metric
(joint SVD of query, key and value, of gate and up). Each weight is whitened on the side of its outputs by itself, and
scaled so that its error counts with the loss that it causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import energy
from ._output import absorbs, along, holder, whitened
from .base import Decomposition, Factors

__all__ = ["Stacked", "fit_stacked", "shared", "stacked"]


def shared(layout: Layout) -> frozenset[str]:
    """Names of the factors that weights of one input can have in common: all that hold no outputs. None where the
    outputs are split, pivoted or in groups.
    """
    shape = layout.rebuild
    if layout.axes.get("g", 1) != 1 or not absorbs(layout):
        return frozenset()
    if any(pivot.split == "o" for pivot in shape.pivots.values()):
        return frozenset()
    names = {name for name, term in shape.factors.items() if "o" not in term.axes}
    return frozenset(names | {pivot.index for name, pivot in shape.pivots.items() if name in names})


@dataclass(frozen=True, eq=False)
class Stacked:
    """The weights one above the other, (sum of o, i, ...), each whitened and scaled; the metric of their input; and for
    each weight the matrix (1, o, o), or number, that takes both back.
    """

    weight: Tensor
    metric: Metric
    back: tuple[Tensor | float, ...]


def stacked(weights: Sequence[Tensor], metrics: Sequence[Metric], losses: Sequence[float]) -> Stacked:
    """Weights (o, i, ...) of one input, float64. ``losses``: of each, the loss that a relative squared error of one
    would cause, by which the errors are weighted.
    """
    rows, back = [], []
    for weight, metric, loss in zip(weights, metrics, losses, strict=True):
        new = whitened(weight, metric)
        whole = energy(new.weight.reshape(1, weight.shape[0], -1), new.metric)
        scale = (loss / whole) ** 0.5 if loss > 0 and whole > 0 else 0.0
        scale = scale if scale > 0 else 1.0
        rows.append(new.weight * scale)
        back.append(1 / scale if new.back is None else new.back / scale)
    return Stacked(torch.cat(rows), whitened(weights[0], metrics[0]).metric, tuple(back))


def fit_stacked(
    decomposition: Decomposition, whole: Stacked, layout: Layout, members: Sequence[Layout]
) -> list[Factors]:
    """The factors of each weight; those that are shared are the same tensors. ``layout``: of all rows together."""
    factors = decomposition.fit(whole.weight, layout, whole.metric)
    found: list[Factors] = []
    start = 0
    for member, back in zip(members, whole.back, strict=True):
        own: Factors = {}
        for piece in layout.rebuild.pieces:
            name = holder(piece, layout)
            assert name is not None
            term = layout.rebuild.factors[name]
            place = term.axes.index("o")
            apart = factors[name].reshape([layout.axes[axis] for axis in term.axes])
            part = apart.narrow(place, start, member.axes["o"]).reshape(member.shapes[name])
            turned = along("o", back, part, name, member) if isinstance(back, Tensor) else part * back
            own[name] = turned.contiguous()
        found.append({**factors, **own})
        start += member.axes["o"]
    return found
