"""What one run of a model costs, from the shapes of its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import onnx_ir as ir

from .shapes import Known, inferred, measured
from .tensors import graphs, stored

__all__ = ["run_cost"]


def run_cost(model: ir.Model, batch: Mapping[str, Any] | None = None) -> tuple[float, int]:
    """Multiply-adds of all Conv, ConvTranspose, MatMul and Gemm, and the most bytes of activations that live at a time
    when the nodes run in their order (inputs included, weights not).

    0 for what is not known: a size that depends on data or on inputs that were not given, and the multiply-adds of a
    model with such operators in bodies or functions.
    """
    given = {name: tuple(entries.shape) for name, entries in (batch or {}).items() if hasattr(entries, "shape")}
    try:
        known = inferred(model, None if batch is None else given)
    except _ODD:
        return 0.0, 0
    if batch is not None and (missing := _missing(model.graph, known)):
        known |= measured(model, batch, missing)
    return float(_or_zero(_macs, model, known)), int(_or_zero(_peak, model, known))


def _missing(graph: ir.Graph, known: Known) -> list[str]:
    """Values that nodes make, whose sizes are not all known."""
    made = [value.name or "" for node in graph if node.op_type != "Constant" for value in node.outputs]
    return [name for name in made if name and None in known.get(name, (None,))]


_ODD = (RuntimeError, ValueError, TypeError, IndexError, KeyError)
"""What a graph that nobody can infer raises."""


def _or_zero(count: Callable[[ir.Model, Known], float], model: ir.Model, known: Known) -> float:
    try:
        return count(model, known)
    except _ODD:
        return 0


def _macs(model: ir.Model, known: Known) -> float:
    total = 0.0
    for graph, where in graphs(model):
        for node in graph:
            rule = _RULES.get(node.op_type) if node.domain == "" else None
            if rule is None:
                continue
            if where:
                return 0.0
            total += rule(node, *(_shape(value, known) for value in (*node.inputs[:2], node.outputs[0])))
    return total


Shape = tuple[int, ...]


def _shape(value: ir.Value | None, known: Known) -> Shape:
    """The shape of a value. Raises ValueError if some size is not known."""
    tensor = None if value is None else stored(value)
    name = "" if value is None else value.name or ""
    shape = tuple(tensor.shape.numpy()) if tensor is not None else known.get(name, (None,))
    sizes = tuple(int(size) for size in shape if size is not None)
    if len(sizes) != len(shape):
        raise ValueError(f"the shape of {name!r} is not known")
    return sizes


def _conv(node: ir.Node, data: Shape, weight: Shape, output: Shape) -> int:
    return prod(output) * prod(weight[1:])


def _transposed(node: ir.Node, data: Shape, weight: Shape, output: Shape) -> int:
    return prod(data) * prod(weight[1:])


def _matmul(node: ir.Node, first: Shape, second: Shape, output: Shape) -> int:
    return prod(output) * first[-1]


def _gemm(node: ir.Node, first: Shape, second: Shape, output: Shape) -> int:
    return prod(output) * first[0 if node.attributes.get_int("transA", 0) else 1]


_RULES: Mapping[str, Callable[[ir.Node, Shape, Shape, Shape], int]] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "Gemm": _gemm,
}


def _peak(model: ir.Model, known: Known) -> int:
    """The greatest sum of the sizes of values between their making and their last reader."""
    graph, nodes = model.graph, list(model.graph)
    ends = {value: k for k, node in enumerate(nodes) for value in node.inputs if value is not None}
    for k, node in enumerate(nodes):  # a body reads at its node
        for inner in _bodies(node):
            ends.update((value, k) for value in inner.inputs if value is not None and value.graph is graph)
    ends.update((value, len(nodes)) for value in graph.outputs)
    moving = [value for value in graph.inputs if value.const_value is None]
    live = sum(_bytes(value, known) for value in moving)
    most, going = live, _by_end(moving, ends)
    for k, node in enumerate(nodes):
        made = [] if node.op_type == "Constant" else [value for value in node.outputs if value.name]
        live += sum(_bytes(value, known) for value in made)
        most = max(most, live)
        for value in made:
            going.setdefault(max(ends.get(value, k), k), []).append(value)
        live -= sum(_bytes(value, known) for value in going.pop(k, ()))
    return most


def _bodies(node: ir.Node) -> list[ir.Node]:
    """All nodes in the bodies of a node."""
    found: list[ir.Node] = []
    for attribute in node.attributes.values():
        bodies = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else ()
        for body in attribute.value if attribute.type == ir.AttributeType.GRAPHS else bodies:
            for inner in body:
                found += [inner, *_bodies(inner)]
    return found


def _by_end(values: list[ir.Value], ends: Mapping[ir.Value, int]) -> dict[int, list[ir.Value]]:
    going: dict[int, list[ir.Value]] = {}
    for value in values:
        going.setdefault(ends.get(value, -1), []).append(value)
    return going


def _bytes(value: ir.Value, known: Known) -> int:
    dtype = value.dtype
    return prod(_shape(value, known)) * (4 if dtype is None or dtype == ir.DataType.STRING else -(-dtype.bitwidth // 8))
