"""Batch normalisation in evaluation mode as a part of the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from ..graph import fold_norm

__all__ = ["Norm", "fold"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch normalisation that reads the output of one layer and nothing else; ``paths`` are all its names."""

    module: nn.Module
    paths: tuple[str, ...]
    output: fx.Node

    @property
    def path(self) -> str:
        return self.paths[0]


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias that do the work of the normalisation as well, see :func:`tdc.frontends.graph.fold_norm`."""
    return fold_norm(weight, bias, {**norm._parameters, **norm._buffers}, float(norm.eps))  # type: ignore[arg-type]
