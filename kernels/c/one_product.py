"""One product: what layers that share their other factors have of their own, and what they share.

Equation: ``b i, o i -> b o`` + bias, with x (..., i), weight (o, i), bias (o). With ``order`` (i + o,) int32 the input
(..., i + o) is gathered, g = x[order], and its first o entries pass by: ``y = g[:o] + g[o:] weight'`` + bias. The C
code is in two_products.c; limits and rounding are the same. The operator is torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base import Kernel, Line
from .two_products import available, library

__all__ = ["KERNELS", "reference", "run"]


@functools.cache
def _code() -> tuple[Any, int]:
    found: Any = library()
    return found.tdc_one_product, found.tdc_version()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    *,
    version: int | None = None,
) -> Tensor:
    """The C code. ``version``: see :func:`tdc.kernels.c.two_products.run`."""
    code, widest = _code()
    outputs, inputs = weight.shape
    entries = inputs if order is None else inputs + outputs
    given = [t for t in (x, weight, bias) if t is not None]
    if (
        x.ndim < 1
        or x.shape[-1] != entries
        or (bias is not None and bias.shape != (outputs,))
        or (order is not None and (order.shape != (entries,) or order.dtype is not torch.int32))
    ):
        raise ValueError(f"the shapes do not fit: {[list(t.shape) for t in given]}")
    if not all(t.is_cpu and t.dtype is torch.float32 for t in given):
        raise ValueError("the C code takes float32 on the processor")
    taken = [t if t is None else t.contiguous() for t in (x, weight, bias, order)]
    y = x.new_empty((*x.shape[:-1], outputs))
    failed = code(
        widest if version is None else version,
        torch.get_num_threads(),
        *[t if t is None else t.data_ptr() for t in taken],
        y.data_ptr(),
        y.numel() // outputs if outputs else 0,
        inputs,
        outputs,
    )
    if failed:
        error, reason = _FAILURES.get(failed, (ValueError, f"this processor does not have version {version}"))
        raise error(reason)
    return y


_FAILURES: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for the gathered input"),
    2: (IndexError, "an index is out of range"),
}


def prepare(
    weight: Tensor, bias: Tensor | None = None, order: Tensor | None = None
) -> tuple[Callable[[int, int, int, int], int], int, int]:
    """As :func:`tdc.kernels.c.two_products.prepare`."""
    code, widest = _code()
    pointers = [t if t is None else t.data_ptr() for t in (weight, bias, order)]
    outputs, inputs = weight.shape

    def call(x: int, y: int, rows: int, threads: int) -> int:
        failed: int = code(widest, threads, x, *pointers, y, rows, inputs, outputs)
        return failed

    return call, inputs + (0 if order is None else outputs), outputs


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """The same by stock operators."""
    if order is None:
        return functional.linear(x, weight, bias)
    gathered, passed = x.index_select(-1, order), len(weight)
    return gathered[..., :passed] + functional.linear(gathered[..., passed:], weight, bias)


def _gathering(call: Any) -> Any:
    """``call`` with the arguments in the order of the lines."""
    return lambda x, order, weight, bias: call(x, weight, bias, order)


KERNELS = (
    Kernel(
        "one product",
        (Line.parse("t0 = matmul(x, weight)  # b i, o i -> b o"),),
        ("weight",),
        "float32, on the processor",
        functional.linear,
        run,
        functional.linear,
        available,
        registered=False,
        prepare=prepare,
    ),
    Kernel(
        "one product behind a gather",
        (
            Line.parse("t0 = take(x, order[0:o])"),
            Line.parse("t1 = take(x, order[o:i])"),
            Line.parse("t2 = matmul(t1, weight)  # b i, o i -> b o"),
            Line.parse("t3 = add(t0, t2)"),
        ),
        ("order", "weight"),
        "float32, on the processor",
        _gathering(reference),
        _gathering(run),
        _gathering(reference),
        available,
        registered=False,
        prepare=lambda order, weight, bias: prepare(weight, bias, order),
    ),
)
