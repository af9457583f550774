"""Convolutions one behind the other in one call, what lies between them in cache; see convolutions.c.

Equations: those of ``b g i p q, (g o) i p q -> b g o`` for each, without p, q or both where its window has one tap;
float32, one group, no dilation, images in the order (examples, channels, height, width). The bias is the last one's.
Rounding: sums in another order than torch's, no farther from the exact result. The operator is the chain of torch's
own.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline, OpKind

from ..base import Kernel, Line, Windows
from .two_products import available, library

__all__ = ["KERNELS", "reference", "run"]

LIMITS = "float32, on the processor, contiguous, one group, no dilation"
MOST = 4
"""Convolutions in one call."""


@functools.cache
def _code() -> tuple[Any, int]:
    found: Any = library()
    return found.tdc_convolutions, found.tdc_version()


def run(x: Tensor, *operands: Any, version: int | None = None) -> Tensor:
    """The C code on ``x, *weights, bias, windows``; ``version``: see :func:`tdc.kernels.c.two_products.run`."""
    *weights, bias, windows = operands
    code, widest = _code()
    if not all(t.is_cpu and t.dtype is torch.float32 for t in (x, *weights, bias) if t is not None):
        raise ValueError("the C code takes float32 on the processor")
    numbers, shape = _stages(tuple(x.shape), tuple(tuple(weight.shape) for weight in weights), windows)
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"the bias {list(bias.shape)} does not fit {shape[0]} outputs")
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((len(x), *shape))
    failed = code(
        widest if version is None else version,
        torch.get_num_threads(),
        x.data_ptr(),
        (ctypes.c_void_p * len(weights))(*[weight.data_ptr() for weight in weights]),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *x.shape,
        len(weights),
        numbers,
    )
    if failed == 1:
        raise MemoryError("no memory for what lies between the convolutions")
    if failed:
        raise ValueError(f"this processor does not have version {version}")
    return y


@functools.lru_cache(maxsize=1024)
def _stages(given: tuple[int, ...], weights: tuple[tuple[int, ...], ...], windows: Windows) -> tuple[Any, torch.Size]:
    """What the C code is told of each convolution, and the shape of one output. ValueError where they do not fit."""
    if len(given) != 4 or not 0 < len(weights) == len(windows) <= MOST:
        raise ValueError(f"the shapes do not fit: {given}, {weights}")
    _, channels, height, width = given
    numbers: list[int] = []
    for shape, (down, across) in zip(weights, windows, strict=True):
        taps = [window.size for window in (down, across) if window.size > 1]
        if shape[1:2] != (channels,) or [size for size in shape[2:] if size > 1] != taps:
            raise ValueError(f"the weight {shape} does not fit {channels} channels and the windows {down}, {across}")
        if down.dilation != 1 < down.size or across.dilation != 1 < across.size:
            raise ValueError("the C code takes no dilation")
        (top, _), (left, _) = down.padding(height), across.padding(width)
        numbers += [shape[0], down.size, across.size, down.stride, across.stride, top, left]
        channels, height, width = shape[0], down.positions(height), across.positions(width)
        numbers += [height, width]
        if not height or not width:
            raise ValueError("the input is smaller than the window")
    return (ctypes.c_long * len(numbers))(*numbers), torch.Size((channels, height, width))


def reference(x: Tensor, *operands: Any) -> Tensor:
    """The same by stock operators."""
    *weights, bias, windows = operands
    for place, (weight, slides) in enumerate(zip(weights, windows, strict=True)):
        pads = [window.padding(length) for window, length in zip(slides, x.shape[2:], strict=True)]
        if any(before != after for before, after in pads):
            x = functional.pad(x, [size for pair in reversed(pads) for size in pair])
            pads = [(0, 0)] * len(pads)
        x = functional.conv2d(
            x,
            weight.reshape(*weight.shape[:2], *(window.size for window in slides)),
            bias if place == len(weights) - 1 else None,
            [window.stride for window in slides],
            [before for before, _ in pads],
            [window.dilation for window in slides],
        )
    return x


def _limits(sizes: dict[str, int], windows: Windows) -> Decline | None:
    if sizes["g"] != 1 or any(window.dilation != 1 < window.size for slides in windows for window in slides):
        return Decline(f"takes {LIMITS}")
    return None


def _kernel(name: str, lines: str, factors: str) -> Kernel:
    return Kernel(
        name,
        tuple(Line.parse(line) for line in lines.strip().splitlines()),
        tuple(factors.split()),
        LIMITS,
        reference,
        run,
        reference,
        available,
        OpKind.CONV2D,
        _limits,
    )


KERNELS = (
    _kernel(
        "convolutions: channels, window, channels",
        """
        t0 = conv(x, first)  # b g i p q, (g r) i -> b g p q r
        t1 = conv(t0, core)  # b g p q r, (g s) r p q -> b g s
        t2 = conv(t1, last)  # b g s, (g o) s -> b g o
        """,
        "first core last",
    ),
    _kernel(
        "convolutions: window, channels",
        """
        t0 = conv(x, first)  # b g i p q, (g r) i p q -> b g r
        t1 = conv(t0, last)  # b g r, (g o) r -> b g o
        """,
        "first last",
    ),
    _kernel(
        "convolutions: channels, window",
        """
        t0 = conv(x, first)  # b g i p q, (g r) i -> b g p q r
        t1 = conv(t0, last)  # b g p q r, (g o) r p q -> b g o
        """,
        "first last",
    ),
    _kernel(
        "convolutions: down, across",
        """
        t0 = conv(x, first)  # b g i p q, (g r) i p -> b g q r
        t1 = conv(t0, last)  # b g q r, (g o) r q -> b g o
        """,
        "first last",
    ),
    _kernel(
        "convolutions: channels, down, across, channels",
        """
        t0 = conv(x, first)  # b g i p q, (g r) i -> b g p q r
        t1 = conv(t0, down)  # b g p q r, (g l) r p -> b g q l
        t2 = conv(t1, across)  # b g q l, (g s) l q -> b g s
        t3 = conv(t2, last)  # b g s, (g o) s -> b g o
        """,
        "first down across last",
    ),
)
