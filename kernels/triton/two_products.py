"""Two products with one intermediate on NVIDIA GPUs: what ``tdc::two_products`` runs there; see the C kernel of it.

One row, or few of float16 or bfloat16: two launches that are bound by reading the factors, see :mod:`.few_rows`; the
intermediate goes through the L2 cache. Few rows by a large factor with many outputs are cuBLAS's. More rows: two
products by cuBLAS, written where they belong, and one launch for a gather. (A program that fused both for 64 or 128
rows would read all factors once for these: at 2048 rows and more, that is more traffic than the intermediate, which it
saves.) Rounding: of the intermediate and of the result, to the type of x, as torch; an index out of range gives NaN.
Results are the same at every call.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..c import one_product as stock
from ..c import two_products as base
from .device import available, runs_here

__all__ = ["DTYPES", "KERNELS", "ROWS", "few", "run", "settled"]

ROWS = 64
"""Most rows that the kernel for few rows takes."""
SMALL = 16 << 20
"""Bytes of a factor up to which the kernel takes 32 rows, not 16."""
LARGE = 48 << 20
WIDE = 16384
"""Bytes, and outputs, of a factor from which cuBLAS multiplies few rows by it, more than one, faster (an H200)."""
NAMES = ("float16", "bfloat16", "float32")
DTYPES = tuple(getattr(torch, name) for name in NAMES)
LIMITS = "float16, bfloat16 or float32, on an NVIDIA GPU"
_seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def run(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
    *,
    by: str | None = None,
) -> Tensor:
    """``by``: the kernel for ``few`` rows, or cuBLAS for ``many`` (default: by :func:`few`)."""
    outputs = base.checked_outputs(x, first, second, bias, order, place, stacked)
    if x.dtype not in DTYPES or not runs_here(x, first, second, bias, order, place):
        raise ValueError(f"tdc::two_products: the Triton code takes {LIMITS}")
    if not x.numel() or not first.numel() or not second.numel():
        return base.reference(x, first, second, bias, order, place, stacked)
    flat = x.reshape(-1, x.shape[-1])
    multiply = _few if (by or few(len(flat), first, second)) == "few" else _many
    return multiply(flat, first, second, bias, order, place, stacked).reshape(*x.shape[:-1], outputs)


def few(rows: int, *factors: Tensor) -> str:
    """``few`` or ``many``, whichever was faster on an H200: the matrix units have no exact float32."""
    if rows == 1:
        return "few"
    most = 32 if max(factor.nbytes for factor in factors) <= SMALL else 16
    return "few" if rows <= most and factors[0].dtype is not torch.float32 else "many"


def _wide(rows: int, weight: Tensor) -> bool:
    return rows > 1 and len(weight) >= WIDE and weight.nbytes >= LARGE


def settled(weight: Tensor) -> bool:
    """Whether the weight is as it was at an earlier call, so that the launch before this one does not write it."""
    if weight.is_inference():
        return False
    key, now = id(weight), (weight._version, weight.data_ptr())
    known = _seen.get(key)
    if known is not None and known[0]() is weight and known[1:] == now:
        return True
    _seen[key] = (weakref.ref(weight, lambda _: _seen.pop(key, None)), *now)
    return False


def _few(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    place: Tensor | None,
    stacked: bool,
) -> Tensor:
    from .few_rows import gathered, product

    rank, early = first.shape[0], order is not None or (first.is_contiguous() and settled(first))
    x, first, second = x.contiguous(), first.contiguous(), second.contiguous()
    bias, order, place = (t if t is None else t.contiguous() for t in (bias, order, place))
    x = x if order is None else gathered(x, order)
    inner = product(x, first, rank=rank, passed=order is not None, early=early)
    if not stacked and _wide(len(x), second):
        return functional.linear(inner, second, bias)
    # Where the launch before is one of ours, what came before that one has ended, and nobody writes the factors.
    return product(inner, second, bias, place=place, rank=rank, stacked=stacked, early=True)


def _many(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    place: Tensor | None,
    stacked: bool,
) -> Tensor:
    from .few_rows import gathered

    rank = first.shape[0]
    rest = x if order is None else gathered(x.contiguous(), order.contiguous())
    if not stacked:
        inner = rest @ first.T if order is None else torch.addmm(rest[:, :rank], rest[:, rank:], first.T)
        return functional.linear(inner, second, bias)
    stack = x.new_empty(len(x), rank + len(second))
    inner = stack[:, :rank]
    if order is None:
        torch.mm(rest, first.T, out=inner)
    else:
        torch.addmm(rest[:, :rank], rest[:, rank:], first.T, out=inner)
    torch.mm(inner, second.T, out=stack[:, rank:])
    if place is not None:
        return gathered(stack, place.contiguous(), bias if bias is None else bias.contiguous())
    return stack if bias is None else stack.add_(bias)


def one_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``b i, o i -> b o`` + bias, by the same code."""
    if x.dtype is not weight.dtype or x.dtype not in DTYPES or not runs_here(x, weight, bias):
        raise ValueError(f"the Triton code takes {LIMITS}")
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if not rows or not weight.numel() or few(rows, weight) == "many" or _wide(rows, weight):
        return functional.linear(x, weight, bias)
    if weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"the shapes do not fit: {[list(t.shape) for t in (x, weight, bias) if t is not None]}")
    from .few_rows import product

    early = weight.is_contiguous() and settled(weight)
    bias = bias if bias is None else bias.contiguous()
    flat = x.reshape(rows, -1).contiguous()
    return product(flat, weight.contiguous(), bias, early=early).reshape(*x.shape[:-1], len(weight))


NAME = "{}, on the GPU"
KERNELS = (
    *base.kernels_by(run, LIMITS, available, NAME, device="cuda", dtypes=NAMES),
    replace(
        stock.KERNELS[0],
        name=NAME.format(stock.KERNELS[0].name),
        limits=LIMITS,
        run=one_product,
        available=available,
        device="cuda",
        dtypes=NAMES,
    ),
)
