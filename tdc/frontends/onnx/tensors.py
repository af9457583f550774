"""ONNX tensors as numpy and torch arrays, without a copy where there is a choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "array",
    "behind",
    "constant_tensor",
    "constants",
    "entries_of",
    "graphs",
    "stored",
    "to_numpy",
    "to_torch",
]

FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
"""Element types that can be decomposed, with their torch names."""


def array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The stored entries, read only; bfloat16 as the numpy extension type."""
    return tensor.numpy()


def to_torch(values: np.ndarray) -> Tensor:
    """The same memory as a torch tensor (a copy only where torch cannot share it)."""
    if values.dtype.name == "bfloat16":
        return to_torch(values.view(np.uint16)).view(torch.bfloat16)
    if not values.flags.writeable or not values.dtype.isnative or any(stride < 0 for stride in values.strides):
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    return torch.from_numpy(values)


def to_numpy(tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """A contiguous array of that element type; bfloat16 as the numpy extension type."""
    values = tensor.detach().cpu()
    if dtype == ir.DataType.BFLOAT16:
        return values.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().view(dtype.numpy())
    return np.ascontiguousarray(values.numpy().astype(dtype.numpy(), copy=False))


def graphs(model: ir.Model) -> Iterator[tuple[ir.Graph | ir.Function, str]]:
    """Every graph and function with where it is: '' for the main graph, else a few words."""
    yield model.graph, ""
    for graph in model.graph.subgraphs():
        if graph is not model.graph:
            yield graph, "inside the body of an If, Loop or Scan"
    for function in model.functions.values():
        where = f"inside the function {function.domain}::{function.name}"
        yield function, where
        for graph in function.subgraphs():
            yield graph, where


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node written as attribute ``value``."""
    if node.op_type != "Constant" or node.domain != "":
        return None
    attribute = node.attributes.get("value")
    return attribute.value if attribute is not None and not attribute.is_ref() else None


def constants(graph: ir.Graph | ir.Function) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers, then Constant nodes, of one graph (not of its subgraphs)."""
    if isinstance(graph, ir.Graph):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in graph:
        tensor = constant_tensor(node)
        if tensor is not None:
            yield node.outputs[0], tensor


def behind(value: ir.Value, *passing: str) -> ir.Value:
    """The value from which Identity nodes, and those of the operators ``passing``, hand on this one."""
    while (node := value.producer()) is not None and node.domain == "" and node.op_type in ("Identity", *passing):
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer, or of a Constant's output; None for every other value."""
    producer = value.producer()
    return value.const_value if producer is None else constant_tensor(producer)


def entries_of(value: ir.Value, known: Mapping[str, Any]) -> Any:
    """What a value holds: computed or given, by name, or stored."""
    if (name := value.name or "") in known:
        return known[name]
    tensor = stored(value)
    assert tensor is not None
    return array(tensor)
