"""Convolutions one behind the other in one call, what lies between them in cache; see convolutions.c.

Equations: those of ``b g i p q, (g o) i p q -> b g o`` for each, without p, q or both where its window has one tap;
float32, one group, no dilation, images in the order (examples, channels, height, width). The bias is the last one's.
With ``order`` (i,) int32 the first one, 1 x 1, is behind a gather of the channels: ``h = x[order[:r]] + first
x[order[r:]]``. If ``stacked`` the last one, 1 x 1, stands beside what it reads, ``y = [h, last h]``, and ``place`` (o,)
int32, a permutation, may gather the output.
Rounding: sums in another order than torch's, no farther from the exact result. The operator is ``tdc::convolutions``;
where the padding depends on the lengths it is the chain of torch's own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline, OpKind, Window

from ..base import Kernel, Line, Windows
from ..operator import Operator
from .two_products import available, library

__all__ = ["KERNELS", "reference", "run"]

LIMITS = "float32, on the processor, contiguous, one group, no dilation"
MOST = 4
"""Convolutions in one call."""


@functools.cache
def _code() -> tuple[Any, int]:
    found: Any = library()
    return found.tdc_convolutions, found.tdc_version()


def run(
    x: Tensor,
    *operands: Any,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
    version: int | None = None,
) -> Tensor:
    """The C code on ``x, *weights, bias, windows``; ``version``: see :func:`tdc.kernels.c.two_products.run`."""
    *weights, bias, windows = operands
    code, widest = _code()
    if not all(t.is_cpu and t.dtype is torch.float32 for t in (x, *weights, bias) if t is not None):
        raise ValueError("the C code takes float32 on the processor")
    shapes = tuple(tuple(weight.shape) for weight in weights)
    numbers, shape = _stages(tuple(x.shape), shapes, windows, order is not None, stacked)
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"the bias {list(bias.shape)} does not fit {shape[0]} outputs")
    for index, length in ((order, x.shape[1]), (place, shape[0] if stacked else -1)):
        if index is not None and (index.dtype is not torch.int32 or index.shape != (length,)):
            raise ValueError(f"an index {index.dtype} {list(index.shape)} does not fit (place only where stacked)")
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    given = [t if t is None else t.contiguous() for t in (bias, order, place)]
    y = x.new_empty((len(x), *shape))
    failed = code(
        widest if version is None else version,
        torch.get_num_threads(),
        x.data_ptr(),
        (ctypes.c_void_p * len(weights))(*[weight.data_ptr() for weight in weights]),
        *[t if t is None else t.data_ptr() for t in given],
        y.data_ptr(),
        *x.shape,
        len(weights),
        numbers,
        stacked,
    )
    if failed == 1:
        raise MemoryError("no memory for what lies between the convolutions")
    if failed == 2:
        raise IndexError("an index is out of range, or place is no permutation")
    if failed:
        raise ValueError(f"this processor does not have version {version}")
    return y


@functools.lru_cache(maxsize=1024)
def _stages(
    given: tuple[int, ...], weights: tuple[tuple[int, ...], ...], windows: Windows, gathered: bool, stacked: bool
) -> tuple[Any, torch.Size]:
    """What the C code is told of each convolution, and the shape of one output. ValueError where they do not fit."""
    if len(given) != 4 or not 0 < len(weights) == len(windows) <= MOST:
        raise ValueError(f"the shapes do not fit: {given}, {weights}")
    _, channels, height, width = given
    channels -= weights[0][0] if gathered else 0
    ends = [windows[0]] * gathered + [windows[-1]] * stacked
    if not all(window.trivial for pair in ends for window in pair) or (gathered and len(weights) < 2):
        raise ValueError(
            "only a convolution of one tap can be behind a gather or stacked, and the last one cannot be both"
        )
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
    outputs = channels + (weights[-1][1] if stacked else 0)
    return (ctypes.c_long * len(numbers))(*numbers), torch.Size((outputs, height, width))


def reference(
    x: Tensor,
    *operands: Any,
    order: Tensor | None = None,
    place: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    """The same by stock operators."""
    *weights, bias, windows = operands
    passed = None
    if order is not None:
        gathered, rank = x.index_select(1, order), len(weights[0])
        passed, x = gathered[:, :rank], gathered[:, rank:]
    for k, (weight, slides) in enumerate(zip(weights, windows, strict=True)):
        last = k == len(weights) - 1
        made = _convolution(x, weight, bias if last and not stacked else None, slides)
        x = torch.cat([x, made], 1) if last and stacked else made if passed is None or k else passed + made
    x = x if place is None else x.index_select(1, place)
    return x if bias is None or not stacked else x + bias[:, None, None]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, slides: Sequence[Window]) -> Tensor:
    if not weight.numel():  # torch takes no convolution without channels
        lengths = [window.positions(length) for window, length in zip(slides, x.shape[2:], strict=True)]
        return x.new_zeros(len(x), len(weight), *lengths)
    pads = [window.padding(length) for window, length in zip(slides, x.shape[2:], strict=True)]
    if any(before != after for before, after in pads):
        x = functional.pad(x, [size for pair in reversed(pads) for size in pair])
        pads = [(0, 0)] * len(pads)
    return functional.conv2d(
        x,
        weight.reshape(*weight.shape[:2], *(window.size for window in slides)),
        bias,
        [window.stride for window in slides],
        [before for before, _ in pads],
        [window.dilation for window in slides],
    )


def _encoded(windows: Windows) -> list[int] | None:
    """As the operator takes them; None where padding depends on the lengths."""
    if any(window.auto for pair in windows for window in pair):
        return None
    return [n for pair in windows for w in pair for n in (w.size, w.stride, w.dilation, w.before, w.after)]


@functools.lru_cache(maxsize=1024)
def _decoded(numbers: tuple[int, ...]) -> Windows:
    parts = zip(*[iter(numbers)] * 5, strict=True)
    made = [Window("pq"[k % 2], *part) for k, part in enumerate(parts)]
    return tuple(zip(made[::2], made[1::2], strict=True))


def _given(function: Any) -> Any:
    """``function`` with the operator's arguments."""

    def call(
        x: Tensor,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        windows: Sequence[int],
        order: Tensor | None,
        place: Tensor | None,
        stacked: bool,
    ) -> Any:
        named = {"order": order, "place": place, "stacked": stacked}
        return function(x, *weights, bias, _decoded(tuple(windows)), **named)

    return call


def _on_processor(x: Tensor, *operands: Any, **named: Any) -> Tensor:
    plain = x.dtype is torch.float32 and x.is_contiguous() and available() is None
    return (run if plain else reference)(x, *operands, **named)


def _fake(x: Tensor, *operands: Any, order: Tensor | None, place: Tensor | None, stacked: bool) -> Tensor:
    *weights, _, windows = operands
    height, width = x.shape[2:]
    for down, across in windows:
        height, width = down.positions(height), across.positions(width)
    return x.new_empty((x.shape[0], len(weights[-1]) + (weights[-1].shape[1] if stacked else 0), height, width))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, bias, ctx.windows, order, place, ctx.stacked = inputs
    ctx.save_for_backward(x, *weights, bias, order, place)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By the reference, which is computed again."""
    *floats, order, place = ctx.saved_tensors
    held = [None if t is None else t.detach().requires_grad_() for t in floats]
    with torch.enable_grad():
        x, *weights, bias = held
        y = _given(reference)(x, weights, bias, ctx.windows, order, place, ctx.stacked)
    found = iter(torch.autograd.grad(y, [t for t in held if t is not None], grad, allow_unused=True))
    x_grad, *weight_grads, bias_grad = [None if t is None else next(found) for t in held]
    return x_grad, weight_grads, bias_grad, None, None, None, None


operator = Operator(
    "convolutions",
    "convolutions(Tensor x, Tensor[] weights, Tensor? bias, int[] windows, Tensor? order, Tensor? place, "
    "bool stacked) -> Tensor",  # no defaults: what is left out would be missing among the inputs of backward
    {"CPU": _given(_on_processor)},
    _given(reference),
    _given(_fake),
    _backward,
    _setup,
)


def _by_operator(x: Tensor, *operands: Any, **named: Any) -> Tensor:
    *weights, bias, windows = operands
    numbers = _encoded(windows)
    if numbers is None:
        return reference(x, *operands, **named)
    made: Tensor = operator()(x, weights, bias, numbers, *named.values())
    return made


def _limits(sizes: dict[str, int], windows: Windows) -> Decline | None:
    if sizes["g"] != 1 or any(window.dilation != 1 < window.size for slides in windows for window in slides):
        return Decline(f"takes {LIMITS}")
    return None


def _kernel(name: str, lines: str, factors: str) -> Kernel:
    names, stacked = factors.split(), "concat" in lines

    def called(function: Any) -> Any:
        """``function`` with the factors in the order of the lines."""

        def call(x: Tensor, *operands: Any) -> Any:
            *own, bias, windows = operands
            given = dict(zip(names, own, strict=True))
            order, place = given.pop("order", None), given.pop("place", None)
            return function(x, *given.values(), bias, windows, order=order, place=place, stacked=stacked)

        return call

    return Kernel(
        name,
        tuple(Line.parse(line) for line in lines.splitlines() if line.strip()),
        tuple(names),
        LIMITS,
        called(_by_operator),
        called(run),
        called(reference),
        available,
        OpKind.CONV2D,
        _limits,
    )


_BEHIND_A_GATHER = """
t0 = take(x, order[0:r])
t1 = take(x, order[r:i])
t2 = conv(t1, first)  # b g i p q, (g r) i -> b g p q r
t3 = add(t0, t2)
"""
_STACKED = """
t0 = conv(x, first)  # b g i p q, (g r) i p q -> b g r
t1 = conv(t0, last)  # b g r, (g o) r -> b g o
t2 = concat(t0, t1)
"""
_BOTH = f"""{_BEHIND_A_GATHER}
t4 = conv(t3, core)  # b g p q r, (g s) r p q -> b g s
t5 = conv(t4, last)  # b g s, (g o) s -> b g o
t6 = concat(t4, t5)
"""

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
    _kernel(
        "convolutions: channels behind a gather, window",
        f"{_BEHIND_A_GATHER}t4 = conv(t3, last)  # b g p q r, (g o) r p q -> b g o",
        "order first last",
    ),
    _kernel("convolutions: window, channels, stacked", _STACKED, "first last"),
    _kernel(
        "convolutions: window, channels, stacked, before a gather",
        f"{_STACKED}t3 = take(t2, place[0:o])",
        "first last place",
    ),
    _kernel("convolutions: channels behind a gather, window, channels, stacked", _BOTH, "order first core last"),
    _kernel(
        "convolutions: channels behind a gather, window, channels, stacked, before a gather",
        f"{_BOTH}t7 = take(t6, place[0:o])",
        "order first core last place",
    ),
    _kernel("one convolution", "t0 = conv(x, weight)  # b g i p q, (g o) i p q -> b g o", "weight"),
)
