"""One product for few rows of activations: what layers that share their other factors have of their own.

Equation: ``b i, o i -> b o`` + bias, with x (..., i), weight (o, i), bias (o). The C code is in two_products.c; limits
and rounding are the same. Its operator is torch's own linear.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base import Kernel, Line
from .two_products import available, library

__all__ = ["KERNEL", "run"]


@functools.cache
def _code() -> tuple[Any, int]:
    found: Any = library()
    return found.tdc_one_product, found.tdc_version()


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, version: int | None = None) -> Tensor:
    """The C code. ``version``: see :func:`tdc.kernels.c.two_products.run`."""
    code, widest = _code()
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"the shapes do not fit: {[list(t.shape) for t in (x, weight, bias) if t is not None]}")
    if not all(t.is_cpu and t.dtype is torch.float32 for t in (x, weight, bias) if t is not None):
        raise ValueError("the C code takes float32 on the processor")
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32, device=x.device)
    failed = code(
        widest if version is None else version,
        torch.get_num_threads(),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.numel() // outputs if outputs else 0,
        inputs,
        outputs,
    )
    if failed:
        raise ValueError(f"this processor does not have version {version}")
    return y


KERNEL = Kernel(
    "one product",
    (Line.parse("t0 = matmul(x, weight)  # b i, o i -> b o"),),
    ("weight",),
    "float32, on the processor",
    functional.linear,
    run,
    functional.linear,
    available,
)
