"""Several outputs of one input that share the first product: ``tdc::joint_products``.

Equation: ``b i, r i -> b r``, and for each output ``b r, o r -> b o`` + its bias; x (..., i), first (r, i), seconds
(o, r), biases (o), one for each output or none at all. Few rows on an NVIDIA GPU: one launch for the first
product and one for each output, which overlap; see :mod:`.few_rows`. Elsewhere stock operators. Rounding: see
:mod:`.two_products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdc.ir import Block, Decline

from ..base import Match
from ..operator import Operator
from .device import available, runs_here
from .two_products import DTYPES, KERNELS, LIMITS, few, settled

__all__ = ["fits", "operator", "reference", "run"]

_NAME = "joint_products"
_SCHEMA = f"{_NAME}(Tensor x, Tensor first, Tensor[] seconds, Tensor[] biases) -> Tensor[]"


def fits(blocks: Sequence[Block]) -> tuple[Match, ...] | Decline:
    """The blocks as two products each, the first factor shared by name."""
    found = [KERNELS[0].match(block) for block in blocks]
    matches = tuple(match for match in found if isinstance(match, Match))
    if len(matches) < len(found):
        return next(match for match in found if isinstance(match, Decline))
    if len({match.factors[0] for match in matches}) != 1:
        return Decline(f"{_NAME}: the first factors are not one")
    return matches


def run(x: Tensor, first: Tensor, seconds: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> list[Tensor]:
    """The kernels in Triton, for few rows."""
    _check(x, first, seconds, biases)
    if x.dtype not in DTYPES or not runs_here(x, first, *seconds, *biases):
        raise ValueError(f"tdc::{_NAME}: the Triton code takes {LIMITS}")
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    some = all(factor.numel() for factor in (first, *seconds))
    if not rows or not some or few(rows, first, *seconds) == "many":
        return reference(x, first, seconds, biases)
    from .few_rows import product

    early = first.is_contiguous() and settled(first)
    each = [(w.contiguous(), b if b is None else b.contiguous()) for w, b in _pairs(seconds, biases)]
    inner = product(x.reshape(rows, -1).contiguous(), first.contiguous(), early=early)
    return [product(inner, w, b, early=True).reshape(*x.shape[:-1], len(w)) for w, b in each]


def reference(x: Tensor, first: Tensor, seconds: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> list[Tensor]:
    """The same by stock operators."""
    inner = functional.linear(x, first)
    return [functional.linear(inner, w, b) for w, b in _pairs(seconds, biases)]


def _pairs(seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return [(w, biases[k] if biases else None) for k, w in enumerate(seconds)]


def _on_gpu(x: Tensor, *operands: Any) -> list[Tensor]:
    return (run if x.dtype in DTYPES and available() is None else reference)(x, *operands)


def _fake(x: Tensor, first: Tensor, seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    _check(x, first, seconds, biases)
    return [x.new_empty((*x.shape[:-1], len(w))) for w in seconds]


def _check(x: Tensor, first: Tensor, seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """ValueError where the operands do not fit each other."""
    fit = x.ndim > 0 and first.ndim == 2 and x.shape[-1] == first.shape[1] and len(biases) in (0, len(seconds))
    fit = fit and all(w.ndim == 2 and w.shape[1] == first.shape[0] for w in seconds)
    fit = fit and all(b.shape == w.shape[:1] for w, b in zip(seconds, biases, strict=False))
    if not fit or len({t.dtype for t in (x, first, *seconds, *biases)}) != 1:
        found = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in (x, first, *seconds, *biases)]
        raise ValueError(f"tdc::{_NAME}: the operands do not fit each other: {', '.join(found)}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, first, seconds, biases = inputs
    ctx.biases = len(biases)
    ctx.save_for_backward(x, first, *seconds)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """With G of an output: of its factor ``G' h``, of its bias the sum of G; of h the sum of ``G second``."""
    x, first, *seconds = ctx.saved_tensors
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ first.T
    rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    inner_grad = torch.stack([grad @ w for grad, w in zip(rows, seconds, strict=True)]).sum(0)
    of_seconds = [grad.T @ inner for grad in rows]
    of_biases = [grad.sum(0) for grad in rows] if ctx.biases else []
    return (inner_grad @ first).reshape(x.shape), inner_grad.T @ flat, of_seconds, of_biases


operator = Operator(_NAME, _SCHEMA, {"CUDA": _on_gpu}, reference, _fake, _backward, _setup)
