"""A convolution between two pointwise ones: ``tdc::three_convolutions``.

Equation, without groups: ``b i p q, r i -> b p q r ; b p q r, s r p q -> b s ; b s, o s -> b o`` + bias, with x (n, i,
height, width), first (r, i), core (s, r, p, q), last (o, s), bias (o). On NVIDIA GPUs, with the channels of x last, one
launch that keeps both intermediates on the multiprocessor (``whole``), one that keeps the second one behind a product
by cuBLAS (``two``), or three that overlap (``three``), see :mod:`.windows`; elsewhere, and where it is measured to be
faster, the products by cuBLAS and the convolution by cuDNN (``stock``). Rounding: of the intermediates and the result
to the type of x, as torch. Without dilation and groups; what is padded is padded alike on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline

from ..base import Windows
from ..c import convolutions as chain
from ..operator import Operator
from .device import available, runs_here

__all__ = ["KERNEL", "METHODS", "method", "operator", "reference", "run"]

METHODS = ("whole", "two", "three", "stock")
NAMES = ("float16", "bfloat16")
DTYPES = tuple(getattr(torch, name) for name in NAMES)
LIMITS = "float16 or bfloat16, on an NVIDIA GPU, channels last, one group, no dilation"
WIDEST = 256
"""Most channels of the intermediates that a program holds."""
_NAME = "three_convolutions"
_SCHEMA = (
    f"{_NAME}(Tensor x, Tensor first, Tensor core, Tensor last, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0) -> Tensor"
)


def method(x: Tensor, core: Tensor, positions: int, columns: int) -> str:
    """How to run it, as measured on an H200 over the layers of ResNet-18 and -50 at batches of 1, 16 and 64.

    ``positions`` of the output in all, ``columns`` of it in one line.
    """
    s, r = core.shape[:2]
    if x.dtype not in DTYPES or max(s, r) > WIDEST:
        return "stock"
    if positions <= 4096 and columns <= 64 and x.shape[1] <= 64 and s <= 64:
        return "whole"
    if positions <= 1024:
        return "three" if positions * s <= 1 << 16 else "stock"
    return "two" if s <= 80 or (s <= 128 and positions <= 4096) else "stock"


def run(
    x: Tensor,
    first: Tensor,
    core: Tensor,
    last: Tensor,
    bias: Tensor | None = None,
    stride: list[int] | tuple[int, ...] = (1, 1),
    padding: list[int] | tuple[int, ...] = (0, 0),
    *,
    by: str | None = None,
) -> Tensor:
    """The code for NVIDIA GPUs. ``by``: one of :data:`METHODS` (default: :func:`method`). The channels
    of the result lie last.
    """
    _check(x, first, core, last, bias)
    if not runs_here(x, first, core, last, bias):
        raise ValueError(f"tdc::{_NAME}: the Triton code takes {LIMITS}")
    from . import windows as code

    window = code.Window2((core.shape[2], core.shape[3]), _pair(stride), _pair(padding))
    lines, columns = window.positions(*x.shape[2:])
    if not x.numel() or not lines * columns or not min(*first.shape, *last.shape):
        return reference(x, first, core, last, bias, stride, padding)
    by = by or method(x, core, len(x) * lines * columns, columns)
    inside = x.permute(0, 2, 3, 1).contiguous()
    first, last, bias = first.contiguous(), last.contiguous(), bias if bias is None else bias.contiguous()
    if by == "stock":
        return _stock(inside, first, core, last, bias, window)
    packed = core.permute(0, 2, 3, 1).contiguous()
    return code.three(inside, first, packed, last, bias, window, by).permute(0, 3, 1, 2)


def _stock(x: Tensor, first: Tensor, core: Tensor, last: Tensor, bias: Tensor | None, window: Any) -> Tensor:
    """The pointwise ones as products, which cuBLAS runs faster than cuDNN; x has its channels last."""
    inner = (x.flatten(0, 2) @ first.T).unflatten(0, x.shape[:3]).permute(0, 3, 1, 2)
    core = core.contiguous(memory_format=torch.channels_last)
    inner = functional.conv2d(inner, core, None, window.stride, window.padding).permute(0, 2, 3, 1).contiguous()
    result = functional.linear(inner.flatten(0, 2), last, bias)
    return result.unflatten(0, inner.shape[:3]).permute(0, 3, 1, 2)


def reference(
    x: Tensor,
    first: Tensor,
    core: Tensor,
    last: Tensor,
    bias: Tensor | None = None,
    stride: list[int] | tuple[int, ...] = (1, 1),
    padding: list[int] | tuple[int, ...] = (0, 0),
) -> Tensor:
    """The same by stock operators."""
    inner = functional.conv2d(x, first[:, :, None, None])
    inner = functional.conv2d(inner, core, None, _pair(stride), _pair(padding))
    return functional.conv2d(inner, last[:, :, None, None], bias)


def _on_gpu(x: Tensor, *operands: Any) -> Tensor:
    """Channels of the result last exactly where stock operators would put them so."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    ours = last and x.dtype in DTYPES and available() is None
    return (run if ours else reference)(x, *operands)


def _fake(x: Tensor, first: Tensor, core: Tensor, last: Tensor, bias: Any = None, *window: Any) -> Tensor:
    _check(x, first, core, last, bias)
    return reference(x, first, core, last, bias, *window)


def _check(x: Tensor, first: Tensor, core: Tensor, last: Tensor, bias: Tensor | None) -> None:
    """ValueError where the operands do not fit each other."""
    given = [t for t in (x, first, core, last, bias) if t is not None]
    fit = [t.ndim for t in given] == [4, 2, 4, 2, 1][: len(given)] and x.shape[1] == first.shape[1]
    fit = fit and first.shape[0] == core.shape[1] and core.shape[0] == last.shape[1]
    if not fit or len({t.dtype for t in given}) != 1 or (bias is not None and bias.shape != last.shape[:1]):
        found = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in given]
        raise ValueError(f"tdc::{_NAME}: the operands do not fit each other: {', '.join(found)}")


def _pair(value: Any) -> tuple[int, int]:
    both = tuple(int(n) for n in value)
    return (both[0], both[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, core, last, bias, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, first, core, last)
    ctx.biased = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Back through the three by torch's own rules; the intermediates are computed again."""
    x, first, core, last = ctx.saved_tensors
    stride, padding = _pair(ctx.stride), _pair(ctx.padding)
    outer, inner = last[:, :, None, None], first[:, :, None, None]
    one = functional.conv2d(x, inner)
    two = functional.conv2d(one, core, None, stride, padding)

    def back(g: Tensor, at: Tensor, w: Tensor, *window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, zeros = window or ((1, 1), (0, 0))
        both = (True, True, False)
        found = torch.ops.aten.convolution_backward(g, at, w, None, step, zeros, (1, 1), False, (0, 0), 1, both)
        return found[0], found[1]

    grad_two, grad_last = back(grad, two, outer)
    grad_one, grad_core = back(grad_two, one, core, stride, padding)
    grad_x, grad_first = back(grad_one, x, inner)
    bias_grad = grad.sum((0, 2, 3)) if ctx.biased else None
    return grad_x, grad_first[:, :, 0, 0], grad_core, grad_last[:, :, 0, 0], bias_grad, None, None


operator = Operator(_NAME, _SCHEMA, {"CUDA": _on_gpu}, reference, _fake, _backward, _setup)


def _takes(sizes: dict[str, int], windows: Windows) -> Decline | None:
    one, core, three = windows
    alike = all(w.dilation == 1 and not w.auto and w.before == w.after for w in core)
    if sizes["g"] != 1 or not alike or not all(w.trivial for w in (*one, *three)):
        return Decline(f"takes {LIMITS}, what is padded alike on both sides, and one window")
    return None


def _slid(function: Any, x: Tensor, first: Tensor, core: Tensor, last: Tensor, *rest: Any) -> Tensor:
    bias, (_, windows, _) = rest
    found: Tensor = function(x, first, core, last, bias, [w.stride for w in windows], [w.before for w in windows])
    return found


_PLAIN = next(kernel for kernel in chain.KERNELS if kernel.factors == ("first", "core", "last"))
KERNEL = replace(
    _PLAIN,
    name=f"{_PLAIN.name}, on the GPU",
    limits=LIMITS,
    operator=lambda *operands: _slid(operator(), *operands),
    run=lambda *operands: _slid(run, *operands),
    available=available,
    takes=_takes,
    device="cuda",
    dtypes=NAMES,
)
