"""Where the output of one site reaches one other through elementwise operators only, so that its order does not
matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .match import Match, Use
from .tensors import behind, stored

__all__ = ["Region", "consumers", "regions"]

_POINTWISE = frozenset(
    """
    Abs Add Cast Ceil Celu Clip Div Dropout Elu Erf Exp Floor Gelu Greater HardSigmoid HardSwish Identity LeakyRelu
    Less LessOrEqual Log Mish Mul Neg Pow Reciprocal Relu Selu Sigmoid Sign Softplus Softsign Sqrt Sub Tanh
    ThresholdedRelu Where
    """.split()
)


@dataclass(frozen=True, eq=False)
class Region:
    """The elementwise operators between two uses: what reads the first one, and the vectors along its output axis.

    ``vectors``: (node, input) of constants with one entry per output (a bias, a scale); they must take any new order.
    """

    reader: Use
    vectors: tuple[tuple[ir.Node, int], ...]


def consumers(matches: Sequence[Match]) -> dict[int, int]:
    """Place of a match -> place of the one match that reads its output through elementwise operators only."""
    places = {use.node: k for k, match in enumerate(matches) for use in match.uses}
    return {k: places[region.reader.node] for k, region in regions(matches).items()}


def regions(matches: Sequence[Match]) -> dict[int, Region]:
    """The region behind every match that has one."""
    readers = {use.node: use for match in matches for use in match.uses}
    found = {}
    for k, match in enumerate(matches):
        if len(match.uses) == 1 and match.uses[0].linear.output_last:
            region = _region(match.uses[0], match.site.axes["o"], readers)
            if region is not None:
                found[k] = region
    return found


def _region(use: Use, width: int, readers: Mapping[ir.Node, Use]) -> Region | None:
    inside = {use.node.outputs[0]}
    frontier, nodes, reading = [use.node.outputs[0]], [], set()
    while frontier:
        value = frontier.pop()
        if value.is_graph_output():
            return None
        for node, operand in value.uses():
            if _reads_form(node, operand):
                continue
            reader = readers.get(node)
            if reader is not None and reader.linear.data == operand and reader.linear.input_last:
                reading.add(node)
            elif not _passes(node, use, width):
                return None
            elif node.outputs[0] not in inside:
                inside.add(node.outputs[0])
                frontier.append(node.outputs[0])
                nodes.append(node)
    if len(reading) != 1:
        return None
    vectors = [(use.node, 2)] if use.node.op_type == "Gemm" and len(use.node.inputs) > 2 else []
    for node in nodes:
        operands = enumerate(node.inputs) if node.op_type != "Reshape" else ()
        vectors += [(node, k) for k, value in operands if value is not None and value not in inside]
    kinds = [_kind(node.inputs[k], width) for node, k in vectors]
    if None in kinds:
        return None
    kept = tuple(pair for pair, kind in zip(vectors, kinds, strict=True) if kind == "vector")
    if any(not _is_bias(node, use) for node, _ in kept):
        return None
    return Region(readers[next(iter(reading))], kept)


def _is_bias(node: ir.Node, use: Use) -> bool:
    """The use itself (a Gemm), or the addition right behind it: the layer's own vector, no parameter of another."""
    return node is use.node or (node.op_type == "Add" and use.node.outputs[0] in node.inputs)


def _passes(node: ir.Node, use: Use, width: int) -> bool:
    """An elementwise operator of the same graph, or a reshape that leaves the last axis alone."""
    if node.domain != "" or node.graph is not use.node.graph or any(output.uses() for output in node.outputs[1:]):
        return False
    if node.op_type == "Reshape":
        lengths = [v.shape[-1] if v is not None and v.shape else None for v in (node.inputs[0], node.outputs[0])]
        return all(isinstance(length, int) and length == width for length in lengths)
    return node.op_type in _POINTWISE


def _reads_form(node: ir.Node, operand: int) -> bool:
    """Whether only the shape or the type of that input counts, never the order of its entries."""
    return node.domain == "" and (node.op_type in ("Shape", "Size") or (node.op_type == "CastLike" and operand == 1))


def _kind(value: ir.Value | None, width: int) -> str | None:
    """``scalar`` or ``vector`` for a constant that does not, or does, differ along the output axis; None for
    anything else.
    """
    if value is None:
        return None
    source = behind(value, "Cast", "CastLike")
    tensor = stored(source)
    if tensor is None or source.is_graph_input():
        return None
    shape = tensor.shape.numpy()
    size = int(np.prod(shape))
    if size == 1:
        return "scalar"
    return "vector" if size == width == shape[-1] and source is behind(value) else None
