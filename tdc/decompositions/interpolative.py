"""Fewer hidden units between layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..ir import Layout, Metric
from .base import Decomposition, Factors

__all__ = ["Interpolative"]


class Interpolative(Decomposition):
    """``W h = W[:, K] h[K] + W[:, R] h[R]``, with the hidden units h of the rest R as linear functions of those that
    are kept, K: ``W h ~ w h[K]``, one smaller dense weight; the layers that give h keep their rows K.

    Between the layers are elementwise functions, so what is decomposed are the activations (interpolative
    decomposition: Chee et al., NeurIPS 2022; for the MLPs of transformers Lin et al., MoDeGPT, 2024). No weight has
    this layout by itself: it is proposed for all layers around hidden units together (the pass propose-hidden), and
    in place of ``w`` there can be any other layout of the smaller weight.
    """

    name = "interpolative"
    summary = "fewer hidden units between layers, what reads them fitted to make up for the rest: smaller dense layers"
    equations = {"": "o i = w[o i]"}
    between_layers = True
    projects_outputs = True

    def variants(self, axes: Mapping[str, int]) -> tuple[str, ...]:
        return ()

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        return {}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        return []

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        return [0.0 for _ in lattice]

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        return {"w": weight.clone()}
