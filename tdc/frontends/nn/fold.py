"""Batch normalisation in evaluation mode as a part of the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

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
    """``W' = diag(s) W`` and ``b' = beta + s (b - mean)`` with ``s = gamma / sqrt(var + eps)``, worked out in float64.

    ``weight`` (outputs, ...); the results have its dtype.
    """
    state = {name: t.detach().double() for name, t in (*norm.named_parameters(), *norm.named_buffers())}
    scale = (state["running_var"] + float(norm.eps)).rsqrt() * state.get("weight", 1.0)  # type: ignore[arg-type]
    centred = -state["running_mean"] if bias is None else bias.double() - state["running_mean"]
    shift = scale * centred + state.get("bias", 0.0)
    folded = weight.double() * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    return folded.to(weight.dtype), shift.to(weight.dtype)
