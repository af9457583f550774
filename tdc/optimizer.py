"""The optimizer of healing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RotatedAdam"]

_EPSILON = 1e-8
_MOMENT_DECAY = 0.95
_WIDEST = 1024
_PERIOD = 32


class RotatedAdam(torch.optim.Optimizer):
    """Adam in the eigenbasis of the gradients' second moment (SOAP, Vyas et al. 2024), on the shorter side of a matrix.

    For a gradient G of r x n, r <= n (higher orders: first axis against the others), ``C`` is the running mean of
    ``G G^T`` and Q its eigenvectors. Adam's moments are those of ``Q^T G``; a step is ``Q`` times Adam's step there.
    Entry by entry, Adam's first steps are near the sign of G, whose parts along the few directions that all inputs
    share add up: on factored networks they raise the loss 1000 times as much as noise of the same size, or more; the
    rate has to be as small as those directions need. In the eigenbasis they are a few coordinates among many.

    At a change of basis, ``exp_avg`` is rotated, and ``exp_avg_sq`` becomes the diagonal of its rotated diagonal. Bases
    are renewed at steps 1, 2, 4, 8, 16 and at every 32nd. Vectors, and matrices whose shorter side is over 1024, get
    Adam itself. Groups: ``params``, ``lr``.
    """

    KEYS = ("step", "exp_avg", "exp_avg_sq", "moment", "basis")
    """Of what a parameter's state may consist, all tensors."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moved, scale = self._direction(p, p.grad, *group["betas"])
                    p.add_(moved, alpha=-group["lr"] * scale)

    def _direction(self, p: Tensor, gradient: Tensor, first: float, second: float) -> tuple[Tensor, float]:
        """And by how much to multiply it: each pass over tensors of this size counts."""
        matrix = gradient.flatten(1) if p.ndim > 1 else gradient.reshape(1, -1)
        tall = len(matrix) > matrix.shape[1]
        gradient = matrix.T.contiguous() if tall else matrix
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            if 1 < len(gradient) <= _WIDEST:
                state["moment"] = gradient.new_zeros(len(gradient), len(gradient))
                state["basis"] = torch.eye(len(gradient)).to(gradient)
        state["step"] += 1
        step = int(state["step"])
        if "basis" in state:
            _renew(state, gradient, step)
            gradient = state["basis"].T @ gradient
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = math.sqrt(1 - second**step)
        spread = state["exp_avg_sq"].sqrt().add_(_EPSILON * root)
        moved = torch.div(state["exp_avg"], spread, out=spread)
        if "basis" in state:
            moved = state["basis"] @ moved
        return (moved.T if tall else moved).reshape(p.shape), root / (1 - first**step)


def _renew(state: dict[str, Any], gradient: Tensor, step: int) -> None:
    """Take a gradient into the second moment; from time to time take its eigenvectors as the basis."""
    due = step % _PERIOD == 0 if step >= _PERIOD else step & (step - 1) == 0
    if step < _PERIOD or due or step % 4 == 0:
        state["moment"].lerp_(gradient @ gradient.T, max(1 - _MOMENT_DECAY, 1 / step))
    if not due:
        return
    basis = torch.linalg.eigh(state["moment"])[1].contiguous()
    turn = basis.T @ state["basis"]
    state["exp_avg"] = turn @ state["exp_avg"]
    state["exp_avg_sq"] = turn.square() @ state["exp_avg_sq"]
    state["basis"] = basis
