"""The norm in which an approximation of a weight is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METRICS", "Metric"]

METRICS = ("weight", "input")


@dataclass(frozen=True, eq=False)
class Metric:
    """Squared error of ``D = W - W_hat`` with ``W`` of shape (o, i).

    * ``weight``: ``tr(D D^T)``, the Frobenius norm.
    * ``input``: ``tr(D S D^T) = E ||D x||^2`` with ``S = E[x x^T]`` of shape (i, i), float64, uncentred: the mean
      squared error of the site's output (DRONE, Chen et al. 2021; SVD-LLM, Wang et al. 2024).
    """

    name: str
    second_moment: Tensor | None = None
