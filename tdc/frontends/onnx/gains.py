"""The gain of a normalisation in front of a linear site."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from .tensors import array, behind, stored, to_torch
from .uses import Match

__all__ = ["gain_before"]

_NORMS = frozenset(["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"])
_HAND_ON = ("Cast", "CastLike", "Dropout", "Reshape")


def gain_before(match: Match) -> Tensor | None:
    """The constant vector that the input of a linear site has just been multiplied with, by a normalisation or by
    itself; None for other sites, and for those of several uses.

    Before opset 17 a layer normalisation is ``Add(Mul(Div(...), gamma), beta)``.
    """
    use = match.uses[0]
    if len(match.uses) > 1 or use.form.kind.is_conv or not use.form.input_last:
        return None
    node = behind(use.activation, *_HAND_ON).producer()
    width = match.site.axes["i"]
    if node is None:
        return None
    if node.op_type in _NORMS:
        return _vector(node.inputs[1], width)
    if node.op_type == "Add" and node.domain == "":
        node = _multiplied(node, width)
    if node is None or node.op_type != "Mul" or node.domain != "":
        return None
    fitting = [vector for vector in (_vector(value, width) for value in node.inputs) if vector is not None]
    return fitting[0] if len(fitting) == 1 else None


def _multiplied(node: ir.Node, width: int) -> ir.Node | None:
    """The product behind the addition that ends a layer normalisation."""
    if sum(_vector(value, width) is not None for value in node.inputs) != 1:
        return None
    makers = [value.producer() for value in node.inputs if value is not None and _vector(value, width) is None]
    product = makers[0] if makers else None
    if product is None or product.op_type != "Mul":
        return None
    divided = [value.producer() for value in product.inputs if value is not None]
    return product if any(maker is not None and maker.op_type == "Div" for maker in divided) else None


def _vector(value: ir.Value | None, width: int) -> Tensor | None:
    source = None if value is None else behind(value)
    tensor = None if source is None or source.is_graph_input() else stored(source)
    if tensor is None or tuple(tensor.shape.numpy()) != (width,) or not tensor.dtype.is_floating_point():
        return None
    return to_torch(array(tensor))
