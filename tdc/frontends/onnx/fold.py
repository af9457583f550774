"""Where the output of one site reaches one other through elementwise operators only, so that its order does not
matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .constants import known
from .tensors import behind, stored
from .uses import Match, Use

__all__ = ["Region", "Units", "consumers", "regions", "units"]

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


@dataclass(frozen=True, eq=False)
class Units:
    """The hidden units that a use reads: elementwise functions of the outputs of other uses that go nowhere else.
    ``producers``: the places of their matches, each with the vectors along its output axis; ``values``: all in between.
    """

    producers: Mapping[int, tuple[Vector, ...]]
    values: tuple[ir.Value, ...]


def units(matches: Sequence[Match]) -> dict[int, Units]:
    """Place of a match -> the hidden units that it reads, where there are such."""
    single = {k: match.uses[0] for k, match in enumerate(matches) if len(match.uses) == 1}
    linear = {k: use for k, use in single.items() if not use.form.kind.is_conv}
    outputs = {u.output: k for k, u in linear.items() if u.form.output_last and u.tail.norm is None}
    found = {k: _units(use, outputs, single) for k, use in linear.items() if use.form.input_last}
    return {k: hidden for k, hidden in found.items() if hidden is not None}


def _units(reader: Use, outputs: Mapping[ir.Value, int], uses: Mapping[int, Use]) -> Units | None:
    start = reader.activation
    inside, frontier, producers = {start: None}, [start], dict[int, list[Vector]]()
    while frontier:
        value = frontier.pop()
        place = outputs.get(value)
        if place is not None:
            own = _own_bias(uses[place])
            if own is None:
                return None
            producers.setdefault(place, []).extend(own)
            continue
        node = value.producer()
        if node is None or node.op_type not in _POINTWISE or node.domain != "" or node.graph is not reader.node.graph:
            return None
        for operand, entry in enumerate(node.inputs):
            if entry is None or _is_single(entry):
                continue
            given = outputs.get(node.inputs[1 - operand]) if node.op_type == "Add" else None  # type: ignore[arg-type]
            axis = None if given is None else _axis(entry, uses[given])
            if given is not None and axis is not None:
                producers.setdefault(given, []).append((node, operand, axis))
            elif entry not in inside:
                inside[entry] = None
                frontier.append(entry)
    alike = all(uses[k].width == reader.inputs for k in producers)
    found = Units({k: tuple(own) for k, own in producers.items()}, tuple(inside))
    return found if alike and producers and _is_closed(reader, found) else None


def _own_bias(use: Use) -> list[Vector] | None:
    """The bias of a Gemm, where it has one; None for one that is no vector."""
    node = use.node
    if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
        return []
    axis = _axis(node.inputs[2], use)
    return None if axis is None else [(node, 2, axis)][: axis >= 0]


def _is_single(value: ir.Value) -> bool:
    source = behind(value, "Cast", "CastLike")
    tensor = None if source.is_graph_input() else stored(source)
    if tensor is not None:
        return int(np.prod(tuple(tensor.shape.numpy()))) == 1
    entries = known(value)
    return entries is not None and entries.size == 1


def _is_closed(reader: Use, found: Units) -> bool:
    """Whether no value goes elsewhere too."""
    nodes = {value.producer() for value in found.values} | {reader.node}
    uses = [use for value in found.values for use in value.uses()]
    inside = all(_reads_form(node, operand) or node in nodes for node, operand in uses)
    return inside and not any(value.is_graph_output() for value in found.values)


def consumers(matches: Sequence[Match]) -> dict[int, int]:
    """Place of a match -> place of the one match that reads its output through elementwise operators only."""
    places = {use.node: k for k, match in enumerate(matches) for use in match.uses}
    return {k: places[region.reader.node] for k, region in regions(matches).items()}


def regions(matches: Sequence[Match]) -> dict[int, Region]:
    """The region behind every match that has one. Convolutions have none: a gather of channels costs little, and each
    keeps its order.
    """
    readers = {use.node: use for match in matches for use in match.uses}
    found = {}
    for k, match in enumerate(matches):
        use = match.uses[0]
        if len(match.uses) == 1 and use.form.output_last and not use.form.kind.is_conv:
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
    return not reader.form.kind.is_conv and reader.form.input_last


def _vectors(use: Use, nodes: Sequence[ir.Node], inside: set[ir.Value]) -> tuple[Vector, ...] | None:
    """The constants that differ along the output axis; None if there is one that is no bias, or no constant."""
    own = use.tail.norm is None and use.node.op_type == "Gemm" and len(use.node.inputs) > 2
    operands = [(use.node, 2)] if own and use.node.inputs[2] is not None else []
    for node in nodes:
        entries = enumerate(node.inputs) if node.op_type in _POINTWISE else ()
        operands += [(node, k) for k, value in entries if value is not None and value not in inside]
    found = []
    for node, operand in operands:
        axis = _axis(node.inputs[operand], use)
        if axis is None or (axis >= 0 and not _is_bias(node, use)):
            return None
        if axis >= 0:
            found.append((node, operand, axis))
    return tuple(found)


def _is_bias(node: ir.Node, use: Use) -> bool:
    """The use itself (a Gemm), or the addition right behind it: the layer's own vector, no parameter of
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
    return operand == 0 and node.op_type == "Reshape" and _keeps_last(node, use)


def _keeps_last(node: ir.Node, use: Use) -> bool:
    lengths = [v.shape[-1] if v is not None and v.shape else None for v in (node.inputs[0], node.outputs[0])]
    return all(isinstance(length, int) and length == use.width for length in lengths)


def _reads_form(node: ir.Node, operand: int) -> bool:
    """Whether only the shape or the type of that input counts, never the order of its entries."""
    return node.domain == "" and (node.op_type in ("Shape", "Size") or (node.op_type == "CastLike" and operand == 1))


def _axis(value: ir.Value | None, use: Use) -> int | None:
    """The axis of a constant that lies along the outputs, -1 if it does not differ along them; else None."""
    if value is None:
        return None
    source = behind(value, "Cast", "CastLike")
    tensor = stored(source)
    if tensor is None or source.is_graph_input():
        entries = known(value)
        return -1 if entries is not None and entries.shape in ((), (1,)) else None
    shape = tuple(tensor.shape.numpy())
    size = int(np.prod(shape))
    if size == 1:
        return -1
    fits = bool(shape) and size == use.width == shape[-1]
    return len(shape) - 1 if fits and source is behind(value) else None
