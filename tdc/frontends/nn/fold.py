"""Batch normalisation in evaluation mode as a part of the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

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
    """``W' = diag(s) W`` and ``b' = beta + s (b - mean)`` with ``s = gamma / sqrt(var + eps)``.

    ``weight`` (outputs, ...); the results have its dtype. Worked out in float32 (float64 for float64) and in this
    order, as exporters do it, so that a module and its export hold the same weight to the last bit; for torch's root of
    float32 numbers is not always the nearest one, it is taken in float64.
    """
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    state = {name: t.detach().to(exact) for name, t in (*norm.named_parameters(), *norm.named_buffers())}
    var, mean = state["running_var"], state["running_mean"]
    root = (var + float(norm.eps)).double().sqrt().to(exact)  # type: ignore[arg-type]
    scale = state.get("weight", torch.ones_like(var)) / root
    centred = -mean if bias is None else bias.to(exact) - mean
    folded = weight.to(exact) * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    return folded.to(weight.dtype), (centred * scale + state.get("bias", 0.0)).to(weight.dtype)
