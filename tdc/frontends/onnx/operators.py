"""How operators read a weight: a table from operator to matcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ...ir import CONVOLUTIONS, Decline, OpKind, Window

__all__ = ["EINSUM_OPSET", "MATCHERS", "NEGATIVE_AXES_OPSET", "OLDEST_OPSET", "Form", "opset", "sizes_of"]

OLDEST_OPSET = 7
"""Broadcasting is numpy's from this opset on."""
EINSUM_OPSET = 12
NEGATIVE_AXES_OPSET = 11


@dataclass(frozen=True, slots=True)
class Form:
    """How one operator reads a weight: which input is the activation, and how the axes lie.

    ``stored_oi``: the operator wants the weight with its outputs first. ``windows`` and ``groups`` of a convolution,
    whose channels are axis 1 of input and output.
    """

    data: int
    stored_oi: bool
    input_last: bool
    output_last: bool
    kind: OpKind = OpKind.LINEAR
    windows: tuple[Window, ...] = ()
    groups: int = 1


Shape = tuple[int, ...]
Matcher = Callable[[ir.Node, int, int | None, Shape], Form | Decline]


def opset(model: ir.Model) -> int:
    """Version of the standard operators; 0 if the model imports none."""
    versions = model.graph.opset_imports
    return versions.get("", versions.get("ai.onnx", 0))


def sizes_of(form: Form, shape: Shape) -> tuple[tuple[str, int], ...]:
    """Axis sizes of the canonical weight of that shape: o and i, or g, o, i and the window axes."""
    if not form.kind.is_conv:
        return (("o", shape[0]), ("i", shape[1]))
    taps = zip(form.kind.windows, shape[2:], strict=True)
    return (("g", form.groups), ("o", shape[0] // form.groups), ("i", shape[1]), *taps)


def _matmul(node: ir.Node, operand: int, rank: int | None, shape: Shape) -> Form | Decline:
    if len(shape) != 2:
        return Decline(f"MatMul: the weight has rank {len(shape)}, not 2")
    if operand == 1:
        return Form(data=0, stored_oi=False, input_last=True, output_last=True)
    if rank is None:
        return Decline("MatMul: the rank of the activation on its right is unknown")
    return Form(data=1, stored_oi=True, input_last=rank == 1, output_last=rank == 1)


def _gemm(node: ir.Node, operand: int, rank: int | None, shape: Shape) -> Form | Decline:
    if len(shape) != 2:
        return Decline(f"Gemm: the weight has rank {len(shape)}, not 2")
    trans_a, trans_b = (bool(node.attributes.get_int(key, 0)) for key in ("transA", "transB"))
    if operand == 2:
        return Decline("Gemm: a bias is not decomposed")
    if operand == 1:
        return Form(data=0, stored_oi=trans_b, input_last=not trans_a, output_last=True)
    return Form(data=1, stored_oi=not trans_a, input_last=trans_b, output_last=False)


def _conv(node: ir.Node, operand: int, rank: int | None, shape: Shape) -> Form | Decline:
    if operand != 1:
        return Decline("Conv: only its second input is a weight")
    axes, groups = len(shape) - 2, node.attributes.get_int("group", 1)
    if not 1 <= axes <= len(CONVOLUTIONS):
        return Decline(f"Conv: the weight has rank {len(shape)}, not 3 to {len(CONVOLUTIONS) + 2}")
    if groups < 1 or shape[0] % groups:
        return Decline(f"Conv: {shape[0]} outputs do not make {groups} groups")
    kind = CONVOLUTIONS[axes - 1]
    windows = _windows(node, kind, shape[2:])
    if isinstance(windows, Decline):
        return windows
    return Form(0, True, False, False, kind, windows, groups)


def _windows(node: ir.Node, kind: OpKind, taps: Shape) -> tuple[Window, ...] | Decline:
    count, attributes = len(taps), node.attributes
    strides = tuple(attributes.get_ints("strides", (1,) * count))
    dilations = tuple(attributes.get_ints("dilations", (1,) * count))
    pads = tuple(attributes.get_ints("pads", (0,) * (2 * count)))
    auto = attributes.get_string("auto_pad", "NOTSET")
    if auto not in _AUTO:
        return Decline(f"Conv: unknown auto_pad {auto!r}")
    if _AUTO[auto] is not None:
        pads = (0,) * (2 * count)
    if (len(strides), len(dilations), len(pads)) != (count, count, 2 * count) or min(strides + dilations) < 1:
        return Decline(f"Conv: strides {list(strides)}, dilations {list(dilations)}, pads {list(pads)} do not fit")
    if min(pads) < 0:
        return Decline(f"Conv: negative padding {list(pads)}")
    rows = zip(kind.windows, taps, strides, dilations, pads[:count], pads[count:], strict=True)
    return tuple(_same(Window(*row), _AUTO[auto] or "") for row in rows)


_AUTO = {"NOTSET": None, "VALID": "", "SAME_UPPER": "upper", "SAME_LOWER": "lower"}


def _same(window: Window, auto: str) -> Window:
    """The window padded so that there is a position for each stride; with stride 1 that needs no length."""
    if not auto or window.stride > 1:
        return Window(window.axis, window.size, window.stride, window.dilation, window.before, window.after, auto)
    small, large = (window.extent - 1) // 2, window.extent // 2
    before, after = (small, large) if auto == "upper" else (large, small)
    return Window(window.axis, window.size, 1, window.dilation, before, after)


MATCHERS: Mapping[str, Matcher] = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv}
"""Operator -> matcher of (node, index of the weight among its inputs, rank of the activation if known, shape of the
weight).
"""
