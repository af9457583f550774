"""Where the output of one site reaches one other through elementwise operators only, so that its order does not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .constants import known
from .tail import padding_axes
from .tensors import behind, stored
from .uses import Match, Use

__all__ = ["Region", "consumers", "regions"]

_POINTWISE = frozenset(
    """
    Abs Add Cast Ceil Celu Clip Div Dropout Elu Erf Exp Floor Gelu Greater HardSigmoid HardSwish Identity LeakyRelu
    Less LessOrEqual Log Mish Mul Neg Pow Reciprocal Relu Selu Sigmoid Sign Softplus Softsign Sqrt Sub Tanh
    ThresholdedRelu Where
    """.split()
)

Vector = tuple[ir.Node, int, int]
"""(node, input, axis) of a constant with one entry per output."""


@dataclass(frozen=True, eq=False)
class Region:
    """The operators between two uses that leave every output to itself: what reads the first one, and the vectors along
    its output axis (its bias), which must take any new order.
    """

    reader: Use
    vectors: tuple[Vector, ...]


def consumers(matches: Sequence[Match]) -> dict[int, int]:
    """Place of a match -> place of the one match that reads its output through elementwise operators only."""
    places = {use.node: k for k, match in enumerate(matches) for use in match.uses}
    return {k: places[region.reader.node] for k, region in regions(matches).items()}


def regions(matches: Sequence[Match]) -> dict[int, Region]:
    """The region behind every match that has one."""
    readers = {use.node: use for match in matches for use in match.uses}
    found = {}
    for k, match in enumerate(matches):
        use = match.uses[0]
        if len(match.uses) == 1 and (use.form.output_last or use.form.kind.is_conv) and use.form.groups == 1:
            region = _region(use, readers)
            if region is not None:
                found[k] = region
    return found


def _region(use: Use, readers: Mapping[ir.Node, Use]) -> Region | None:
    inside = {use.output}
    frontier, nodes, reading = [use.output], [], set()
    while frontier:
        value = frontier.pop()
        if value.is_graph_output():
            return None
        for node, operand in value.uses():
            if _reads_form(node, operand):
                continue
            reader = readers.get(node)
            if reader is not None and reader.form.data == operand and _takes_order(reader, use):
                reading.add(node)
            elif not _passes(node, operand, use):
                return None
            elif node.outputs[0] not in inside:
                inside.add(node.outputs[0])
                frontier.append(node.outputs[0])
                nodes.append(node)
    vectors = _vectors(use, nodes, inside)
    if len(reading) != 1 or vectors is None:
        return None
    return Region(readers[next(iter(reading))], vectors)


def _takes_order(reader: Use, use: Use) -> bool:
    """Whether the reader contracts the axis of the outputs as a whole."""
    if use.form.kind.is_conv:
        return reader.form.kind is use.form.kind and reader.form.groups == 1
    return not reader.form.kind.is_conv and reader.form.input_last


def _vectors(use: Use, nodes: Sequence[ir.Node], inside: set[ir.Value]) -> tuple[Vector, ...] | None:
    """The constants that differ along the output axis; None if there is one that is no bias, or no constant."""
    own = use.tail.norm is None and use.node.op_type in ("Gemm", "Conv") and len(use.node.inputs) > 2
    operands = [(use.node, 2)] if own and use.node.inputs[2] is not None else []
    for node in nodes:
        entries = enumerate(node.inputs) if node.op_type in _POINTWISE else ()
        operands += [(node, k) for k, value in entries if value is not None and value not in inside]
    found = []
    for node, operand in operands:
        axis = _axis(node.inputs[operand], use, alone=node is use.node and use.form.kind.is_conv)
        if axis is None or (axis >= 0 and not _is_bias(node, use)):
            return None
        if axis >= 0:
            found.append((node, operand, axis))
    return tuple(found)


def _is_bias(node: ir.Node, use: Use) -> bool:
    """The use itself (a Gemm or Conv), or the addition right behind it: the layer's own vector, no parameter of
    another.
    """
    return node is use.node or (node.op_type == "Add" and use.output in node.inputs)


def _passes(node: ir.Node, operand: int, use: Use) -> bool:
    """An operator of the same graph that is elementwise, or treats all outputs of the use alike."""
    idle = not any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    if node.domain != "" or node.graph is not use.node.graph or not idle:
        return False
    if node.op_type in _POINTWISE:
        return True
    rules = _CHANNELWISE if use.form.kind.is_conv else _ROWWISE
    return operand == 0 and node.op_type in rules and rules[node.op_type](node, use)


def _keeps_last(node: ir.Node, use: Use) -> bool:
    lengths = [v.shape[-1] if v is not None and v.shape else None for v in (node.inputs[0], node.outputs[0])]
    return all(isinstance(length, int) and length == use.width for length in lengths)


def _always(node: ir.Node, use: Use) -> bool:
    return True


def _pads_no_channel(node: ir.Node, use: Use) -> bool:
    pads = padding_axes(node, len(use.form.windows) + 2)
    return pads is not None and pads.get(1, (0, 0)) == (0, 0)


def _resizes_no_channel(node: ir.Node, use: Use) -> bool:
    """By its axes, its constant scales or sizes, or the shape of its output."""
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return False
    axes = node.attributes.get_ints("axes", None)
    if axes is not None:
        return not {1, -1 - len(use.form.windows)} & set(axes)
    shape = node.outputs[0].shape
    if shape is not None and len(shape) > 1 and shape[1] == use.width:
        return True
    inputs = node.inputs[2:4] if len(node.inputs) > 2 else node.inputs[1:]
    for value, same in zip(inputs, (1, use.width), strict=False):
        entries = known(value)
        if entries is not None and entries.size > 1 and entries[1] == same:
            return True
    scales = node.attributes.get_floats("scales", ())
    return len(scales) > 1 and scales[1] == 1


def _reduces_no_channel(node: ir.Node, use: Use) -> bool:
    if not node.attributes.get_int("keepdims", 1):
        return False
    axes = known(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes.get_ints("axes", ()))
    rank = len(use.form.windows) + 2
    return axes is not None and axes.size > 0 and not {int(axis) % rank for axis in axes.reshape(-1)} & {0, 1}


_ROWWISE: Mapping[str, Callable[[ir.Node, Use], bool]] = {"Reshape": _keeps_last}
_CHANNELWISE: Mapping[str, Callable[[ir.Node, Use], bool]] = {
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _always),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _always),
    **dict.fromkeys(("ReduceMean", "ReduceMax"), _reduces_no_channel),
    **dict.fromkeys(("Resize", "Upsample"), _resizes_no_channel),
    "Pad": _pads_no_channel,
}


def _reads_form(node: ir.Node, operand: int) -> bool:
    """Whether only the shape or the type of that input counts, never the order of its entries."""
    return node.domain == "" and (node.op_type in ("Shape", "Size") or (node.op_type == "CastLike" and operand == 1))


def _axis(value: ir.Value | None, use: Use, alone: bool) -> int | None:
    """The axis of a constant that lies along the outputs, -1 if it does not differ along them; None for anything else.

    ``alone``: it is the bias of a convolution, which has no other axis.
    """
    if value is None:
        return None
    source = behind(value, "Cast", "CastLike")
    tensor = stored(source)
    if tensor is None or source.is_graph_input():
        entries = known(value)
        return -1 if entries is not None and (entries.shape in ((), (1,)) or (alone and not entries.any())) else None
    shape = tuple(tensor.shape.numpy())
    windows = 0 if alone else len(use.form.windows)
    if use.form.kind.is_conv and len(shape) > windows + 2:
        return None
    size = int(np.prod(shape))
    if size == 1:
        return -1
    axis = len(shape) - 1 - windows
    fits = axis >= 0 and size == use.width == shape[axis]
    return axis if fits and source is behind(value) else None
