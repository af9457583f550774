"""Two products with one intermediate: ``tdc::two_products``, see two_products.c.

Equation: ``b i, r i -> b r ; b r, o r -> b o``, with x (..., i), first (r, i), second (o, r), bias (o). With ``order``
(i,) int32 the input is gathered, g = x[order], its first r entries pass by the first product,
``h = g[:r] + g[r:] first'``, and first is (r, i - r). If ``stacked`` the intermediate stands beside the result,
``y = [h, h second']``, second is (o - r, r), and ``place`` (o,) int32 may gather the output.

Limits of the C code: float32, on the processor; other calls run the reference, in stock operators. Rounding: sums in
another order than torch's, no farther from the exact result.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline

from ..base import Kernel, Line
from ..operator import Operator
from .build import load

__all__ = [
    "KERNELS",
    "available",
    "checked_outputs",
    "kernels_by",
    "library",
    "operator",
    "reference",
    "run",
    "versions",
]

SOURCE = Path(__file__).with_name("kernels.c")
VERSIONS = ("portable", "AVX2", "AVX-512")
_NAME = "two_products"
_SCHEMA = (
    f"{_NAME}(Tensor x, Tensor first, Tensor second, Tensor? bias=None, Tensor? order=None, Tensor? place=None, "
    "bool stacked=False) -> Tensor"
)
_FAILURES: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for the intermediate"),
    2: (IndexError, "an index is out of range"),
}


@functools.cache
def library() -> ctypes.CDLL | Decline:
    """The compiled C code."""
    found = load(SOURCE)
    if isinstance(found, ctypes.CDLL):
        number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_long
        found.tdc_two_products.argtypes = [*[number] * 2, *[pointer] * 7, *[size] * 4, number]
        found.tdc_one_product.argtypes = [*[number] * 2, *[pointer] * 5, *[size] * 3]
        found.tdc_convolutions.argtypes = [*[number] * 2, *[pointer] * 6, *[size] * 4, number, pointer, number]
        found.tdc_runtime.argtypes = [pointer]
        found.tdc_runtime(_runtime())
    return found


def _runtime() -> int | None:
    """Where ``GOMP_parallel`` is in the OpenMP runtime of torch (LLVM's and Intel's have it too), else None."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), os.RTLD_NOLOAD)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def available() -> Decline | None:
    """Why the C code cannot run on this machine, None where it can."""
    found = library()
    return found if isinstance(found, Decline) else None


def versions() -> tuple[str, ...]:
    """The instruction sets of the C code that this processor has, the widest one last."""
    found = library()
    return () if isinstance(found, Decline) else VERSIONS[: found.tdc_version() + 1]


@functools.cache
def _code() -> tuple[Any, int]:
    found = library()
    assert isinstance(found, ctypes.CDLL)
    return found.tdc_two_products, found.tdc_version()


def run(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
    *,
    version: int | None = None,
) -> Tensor:
    """The C code. ``version``: the place in :func:`versions` of the one to run (default: the widest)."""
    code, widest = _code()
    outputs = checked_outputs(x, first, second, bias, order, place, stacked)
    given = [t if t is None or t.is_contiguous() else t.contiguous() for t in (x, first, second, bias, order, place)]
    if x.dtype is not torch.float32 or [t for t in given if t is not None and not t.is_cpu]:
        raise ValueError(f"tdc::{_NAME}: the C code takes float32 on the processor")
    rank, shape = first.shape[0], x.shape
    y = x.new_empty((*shape[:-1], outputs))
    failed = code(
        widest if version is None else version,
        torch.get_num_threads(),
        *[t if t is None else t.data_ptr() for t in given],
        y.data_ptr(),
        y.numel() // outputs if outputs else 0,
        shape[-1],
        rank,
        outputs,
        stacked,
    )
    if failed:
        error, reason = _FAILURES.get(failed, (ValueError, f"this processor does not have version {version}"))
        raise error(f"tdc::{_NAME}: {reason}")
    return y


def prepare(
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
) -> tuple[Callable[[int, int, int, int], int], int, int]:
    """The C code on operands that were checked and are contiguous: called with where x and y begin, rows and threads it
    gives 0 if y has the result. And the numbers of inputs and outputs.
    """
    code, widest = _code()
    pointers = [t if t is None else t.data_ptr() for t in (first, second, bias, order, place)]
    rank, inputs = first.shape
    sizes = (inputs + (0 if order is None else rank), rank, len(second) + (rank if stacked else 0), stacked)

    def call(x: int, y: int, rows: int, threads: int) -> int:
        failed: int = code(widest, threads, x, *pointers, y, rows, *sizes)
        return failed

    return call, sizes[0], sizes[2]


def reference(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    """The same by stock operators."""
    rank = first.shape[0]
    if order is None:
        inner = functional.linear(x, first)
    else:
        gathered = x.index_select(-1, order)
        inner = gathered[..., :rank] + functional.linear(gathered[..., rank:], first)
    if not stacked:
        return functional.linear(inner, second, bias)
    y = torch.cat([inner, functional.linear(inner, second)], -1)
    y = y if place is None else y.index_select(-1, place)
    return y if bias is None else y + bias


def _on_processor(x: Tensor, *operands: Any) -> Tensor:
    if x.dtype is torch.float32 and available() is None:
        return run(x, *operands)
    return reference(x, *operands)


def _on_gpu(x: Tensor, *operands: Any) -> Tensor:
    from ..triton import device
    from ..triton import two_products as gpu

    if x.dtype in gpu.DTYPES and device.available() is None:
        return gpu.run(x, *operands)
    return reference(x, *operands)


def _fake(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], checked_outputs(x, *operands)))


def checked_outputs(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
) -> int:
    """The number of outputs; ValueError where the operands do not fit each other: C code reads what it is told to."""
    if x.ndim < 1 or first.ndim != 2 or second.ndim != 2:
        raise ValueError(_misfit(x, first, second, bias, order, place))
    rank, inputs = first.shape
    outputs, inner = second.shape
    outputs += rank if stacked else 0
    inputs += 0 if order is None else rank
    if (
        x.shape[-1] != inputs
        or inner != rank
        or not x.dtype is first.dtype is second.dtype
        or (bias is not None and (bias.shape != (outputs,) or bias.dtype is not x.dtype))
        or (order is not None and (order.shape != (inputs,) or order.dtype is not torch.int32))
        or (place is not None and (place.shape != (outputs,) or place.dtype is not torch.int32 or not stacked))
    ):
        raise ValueError(_misfit(x, first, second, bias, order, place))
    return outputs


def _misfit(*operands: Tensor | None) -> str:
    names = ("x", "first", "second", "bias", "order", "place")
    pairs = [(name, t) for name, t in zip(names, operands, strict=True) if t is not None]
    found = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in pairs)
    return f"tdc::{_NAME}: the operands do not fit each other (place only where stacked): {found}"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, second, bias, order, place, ctx.stacked = inputs
    ctx.save_for_backward(x, first, second, order, place)
    ctx.needs_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With G the gradient of y: of second ``G' h``, of h ``G second``, and so on back through the gathers."""
    x, first, second, order, place = ctx.saved_tensors
    rank = first.shape[0]
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gathered = x if order is None else x.index_select(1, order)
    rest = gathered if order is None else gathered[:, rank:]
    inner = rest @ first.T if order is None else gathered[:, :rank] + rest @ first.T
    bias_grad = grad.sum(0) if ctx.needs_bias else None
    stack = grad if place is None else torch.zeros_like(grad).index_add(1, place, grad)
    result = stack[:, rank:] if ctx.stacked else stack
    inner_grad = result @ second + stack[:, :rank] if ctx.stacked else result @ second
    x_grad = inner_grad @ first
    if order is not None:
        x_grad = torch.zeros_like(x).index_add(1, order, torch.cat([inner_grad, x_grad], 1))
    shape = (*ctx.saved_tensors[0].shape,)
    return x_grad.reshape(shape), inner_grad.T @ rest, result.T @ inner, bias_grad, None, None, None


def _mapped(info: Any, places: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
    """The axis of vmap is one more leading axis of x; where other operands have it too, one call for each entry."""
    if places[0] is not None and not any(place is not None for place in places[1:]):
        return operator()(operands[0].movedim(places[0], 0), *operands[1:]), 0

    def entry(k: int) -> Tensor:
        pairs = zip(operands, places, strict=True)
        result: Tensor = operator()(*[t if place is None else t.select(place, k) for t, place in pairs])
        return result

    return torch.stack([entry(k) for k in range(info.batch_size)]), 0


operator = Operator(
    _NAME, _SCHEMA, {"CPU": _on_processor, "CUDA": _on_gpu}, reference, _fake, _backward, _setup, _mapped
)


FORMS: tuple[tuple[str, str, str, Any], ...] = (
    (
        "two products",
        """
        t0 = matmul(x, first)  # b i, r i -> b r
        t1 = matmul(t0, second)  # b r, o r -> b o
        """,
        "first second",
        lambda f, x, first, second, bias: f(x, first, second, bias),
    ),
    (
        "two products behind a gather",
        """
        t0 = take(x, order[0:r])
        t1 = take(x, order[r:i])
        t2 = matmul(t1, first)  # b i, r i -> b r
        t3 = add(t0, t2)
        t4 = matmul(t3, second)  # b r, o r -> b o
        """,
        "order first second",
        lambda f, x, order, first, second, bias: f(x, first, second, bias, order),
    ),
    (
        "two products, stacked",
        """
        t0 = matmul(x, first)  # b i, r i -> b r
        t1 = matmul(t0, second)  # b r, o r -> b o
        t2 = concat(t0, t1)
        """,
        "first second",
        lambda f, x, first, second, bias: f(x, first, second, bias, None, None, True),
    ),
    (
        "two products, stacked, before a gather",
        """
        t0 = matmul(x, first)  # b i, r i -> b r
        t1 = matmul(t0, second)  # b r, o r -> b o
        t2 = concat(t0, t1)
        t3 = take(t2, place[0:o])
        """,
        "first second place",
        lambda f, x, first, second, place, bias: f(x, first, second, bias, None, place, True),
    ),
)
"""Name, lines, factors, and how ``f`` with the operator's arguments is called with x, the factors and the bias."""


def kernels_by(
    runner: Any, limits: str, missing: Any, name: str = "{}", preparing: Any = None, **where: Any
) -> tuple[Kernel, ...]:
    """The kernels of all forms, run by ``runner``, a function of the operator's arguments."""

    def bound(function: Any, call: Any) -> Any:
        return lambda x, *operands: call(function, x, *operands)

    return tuple(
        Kernel(
            name.format(form),
            tuple(Line.parse(line) for line in lines.strip().splitlines()),
            tuple(factors.split()),
            limits,
            lambda x, *operands, call=call: call(operator(), x, *operands),
            bound(runner, call),
            bound(reference, call),
            missing,
            prepare=preparing and functools.partial(call, lambda x, *own: preparing(*own), None),
            **where,
        )
        for form, lines, factors, call in FORMS
    )


KERNELS = kernels_by(run, "float32, on the processor", available, preparing=prepare)
