"""Values that no run of the model can change: stored ones, and what exporters compute from them and from shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from .tensors import array, stored

__all__ = ["known", "shape_part"]

_LARGEST = 1 << 22
"""Entries of a value that is computed here."""


def known(value: ir.Value | None) -> np.ndarray | None:
    """The entries of a constant value, None for every other one.

    Beside stored tensors, what the exporter of torch writes for a bias of zeros, ``Expand(CastLike(0, x), Shape(w))``,
    and the like: a few operators on constants.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = stored(value)
    if tensor is not None:
        return None if tensor.dtype == ir.DataType.STRING else array(tensor)
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Constant":
        return _plain(node)
    rule = _RULES.get(node.op_type)
    try:
        result = rule(node) if rule is not None else None
    except (ValueError, IndexError, TypeError):
        return None
    return result if result is None or result.size <= _LARGEST else None


def shape_part(node: ir.Node, shape: tuple[int, ...]) -> np.ndarray:
    """What a Shape node gives for an input of that shape."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return np.array(shape[start:end], dtype=np.int64)


def _plain(node: ir.Node) -> np.ndarray | None:
    """A Constant written as numbers."""
    for key, dtype in _NUMBERS.items():
        if key in node.attributes and not node.attributes[key].is_ref():
            return np.array(node.attributes[key].value, dtype=dtype)
    return None


_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def _same(node: ir.Node) -> np.ndarray | None:
    return known(node.inputs[0])


def _cast(node: ir.Node) -> np.ndarray | None:
    """The number itself, as all readers compute in float64, or want integers; unknown where a fraction is cut off."""
    entries, like = known(node.inputs[0]), node.inputs[1] if node.op_type == "CastLike" else None
    wanted = like.dtype if like is not None else ir.DataType(node.attributes.get_int("to", 0))
    keeps = wanted is not None and wanted.is_floating_point()
    whole = wanted is None or wanted.is_integer()
    if entries is None or keeps:
        return entries
    return entries if whole and bool((entries == np.trunc(entries)).all()) else None


def _shape(node: ir.Node) -> np.ndarray | None:
    tensor = stored(node.inputs[0]) if node.inputs[0] is not None else None
    return None if tensor is None else shape_part(node, tuple(tensor.shape.numpy()))


def _expand(node: ir.Node) -> np.ndarray | None:
    entries, shape = known(node.inputs[0]), known(node.inputs[1])
    if entries is None or shape is None or np.prod(shape) > _LARGEST:
        return None
    return np.broadcast_to(entries, np.broadcast_shapes(entries.shape, tuple(int(size) for size in shape)))


def _reshape(node: ir.Node) -> np.ndarray | None:
    entries, shape = known(node.inputs[0]), known(node.inputs[1])
    if entries is None or shape is None or (shape == 0).any():
        return None
    return entries.reshape([int(size) for size in shape])


def _unsqueeze(node: ir.Node) -> np.ndarray | None:
    entries = known(node.inputs[0])
    axes = known(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes.get_ints("axes", ()))
    if entries is None or axes is None:
        return None
    return np.expand_dims(entries, tuple(int(axis) for axis in axes))


_RULES: Mapping[str, Callable[[ir.Node], np.ndarray | None]] = {
    "Identity": _same,
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Shape": _shape,
    "Expand": _expand,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
}
"""Operator -> its value on constants."""
