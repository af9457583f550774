"""Variants of a model that are run: one that shows what enters the sites, and one that takes weights and biases as
inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ..program import Change
from .constants import known
from .emit import Emitter
from .names import unique_name
from .tail import scales
from .tensors import array, stored, to_numpy
from .uses import Match, Use

__all__ = ["Fed", "clone", "moved", "with_taps", "with_weight_inputs"]

Nodes = Mapping[ir.Node, ir.Node]
Values = dict[ir.Value, ir.Value]


@dataclass(frozen=True, eq=False)
class Fed:
    """An input of the running model: the weight of a site in one orientation, or its bias; ``dense`` by default.

    ``exact`` is the bias in float64, ``scale`` the factor of a Gemm's product.
    """

    order: int
    name: str
    dense: np.ndarray
    dtype: ir.DataType
    stored_oi: bool = True
    exact: np.ndarray | None = None
    scale: float = 1.0

    def value(self, change: Change | None) -> np.ndarray:
        """What to feed for a change of the site."""
        if change is None:
            return self.dense
        if self.exact is None:
            return to_numpy(change.weight if self.stored_oi else change.weight.T, self.dtype)
        shifted = self.exact if change.shift is None else self.exact + self.scale * double(change.shift)
        return shifted.reshape(self.dense.shape).astype(self.dtype.numpy())


def double(tensor: Tensor) -> np.ndarray:
    """The entries in float64."""
    return tensor.detach().cpu().double().numpy()


def clone(model: ir.Model) -> tuple[ir.Model, Values]:
    """A copy of the model that shares its tensors, and which value of it stands for which of the main graph."""
    copy = model.clone()
    values: Values = dict(zip(model.graph.inputs, copy.graph.inputs, strict=True))
    values.update((old, copy.graph.initializers[name]) for name, old in model.graph.initializers.items())
    for old, new in zip(model.graph, copy.graph, strict=True):
        values.update(zip(old.outputs, new.outputs, strict=True))
    return copy, values


def moved(use: Use, nodes: Nodes, values: Mapping[ir.Value, ir.Value]) -> Use:
    """The same use in a copy of the model."""
    add, norm = use.tail.add, use.tail.norm
    return replace(
        use,
        node=nodes[use.node],
        root=values[use.root],
        chain=tuple(nodes[node] for node in use.chain),
        tail=replace(use.tail, add=add and nodes[add], norm=norm and nodes[norm]),
        pad=use.pad and nodes[use.pad],
    )


def with_taps(model: ir.Model, uses: Iterable[Use]) -> tuple[ir.Model, tuple[str, ...]]:
    """The dense model with the values that enter the uses as its outputs; its own outputs if there are none."""
    copy, values = clone(model)
    taps: dict[ir.Value, None] = {}
    for use in uses:
        value = values[use.activation]
        if value.producer() is not None:
            value.type = value.type or ir.TensorType(_tensor(use).dtype)
            taps[value] = None
    outputs = list(taps) or list(copy.graph.outputs)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    return copy, tuple(value.name or "" for value in outputs)


def with_weight_inputs(model: ir.Model, matches: Sequence[Match]) -> tuple[ir.Model, tuple[Fed, ...]]:
    """The dense model with the weights of all sites as inputs, in the orientation that each operator reads, and the
    biases that can be changed; normalisations that are folded into them are left out.

    The Transpose nodes on the way are left out too: onnxruntime 1.32 gives wrong numbers where it fuses one with the
    product of a matrix and a vector, which it does for weights that are not constant.
    """
    copy, values = clone(model)
    inputs = _Inputs(copy)
    nodes = dict(zip(model.graph, copy.graph, strict=True))
    for order, match in enumerate(matches):
        made: dict[bool, ir.Value] = {}
        for use in (moved(use, nodes, values) for use in match.uses):
            if use.form.stored_oi not in made:
                made[use.form.stored_oi] = inputs.weight(use, order)
            bias = inputs.bias(use, order) if match.site.bias else None
            nodes_of_use = (use.node, *use.tail.nodes)
            before = [value for node in nodes_of_use for value in node.inputs if value is not None]
            _connect(copy.graph, use, made[use.form.stored_oi], bias)
            for value in before:  # onnxruntime wants to read every large initializer that it is lent
                inputs.emitter.drop(value)
    return copy, tuple(inputs.fed)


class _Inputs:
    """New inputs of a copy."""

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.emitter = model.graph, Emitter(model)
        self.fed: list[Fed] = []

    def weight(self, use: Use, order: int) -> ir.Value:
        """An input for the weight as ``use`` reads it; dense entries are copied only if stored in another way."""
        tensor, turned = _tensor(use), use.flipped == use.form.stored_oi
        if use.tail.norm is not None:
            whole = use.weight()
            dense = to_numpy(whole if use.form.stored_oi else whole.T, tensor.dtype)
        else:
            dense = array(tensor)
            dense = np.ascontiguousarray(dense.T) if turned and dense.ndim == 2 else dense
        return self._new(Fed(order, self._name("weight", order), dense, tensor.dtype, use.form.stored_oi))

    def bias(self, use: Use, order: int) -> ir.Value:
        exact, dtype = use.bias, _tensor(use).dtype
        assert exact is not None
        shape: tuple[int, ...] = (len(exact),)
        if use.slot is not None and use.slot[0] is not use.node:
            node, operand = use.slot
            old = known(node.inputs[operand])
            assert old is not None
            shape = old.shape
        dense = exact.reshape(shape).astype(dtype.numpy())
        name = self._name("bias", order)
        return self._new(Fed(order, name, dense, dtype, exact=exact, scale=scales(use.node)[0]))

    def _name(self, what: str, order: int) -> str:
        return unique_name(f"tdc.{what}.{order}", self.emitter.values)

    def _new(self, fed: Fed) -> ir.Value:
        self.fed.append(fed)
        value = ir.Value(name=fed.name, shape=ir.Shape(fed.dense.shape), type=ir.TensorType(fed.dtype))
        self.graph.inputs.append(value)
        return value


def _connect(graph: ir.Graph, use: Use, weight: ir.Value, bias: ir.Value | None) -> None:
    """Let a use read its weight and its bias from inputs, without a normalisation."""
    node = use.node
    if use.tail.norm is not None and bias is not None:
        _normless(graph, use, weight, bias)
        return
    node.replace_input_with(1 - use.form.data, weight)
    if bias is None or use.slot is None:
        return
    target, operand = use.slot
    target.replace_input_with(operand, bias)
    if target is node and node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def _normless(graph: ir.Graph, use: Use, weight: ir.Value, bias: ir.Value) -> None:
    """The operator with its bias, in place of itself, the addition and the normalisation behind it."""
    node, data = use.node, use.node.inputs[use.form.data]
    assert data is not None
    inputs = [data, weight] if use.form.data == 0 else [weight, data]
    attributes = [attribute for key, attribute in node.attributes.items() if key != "beta"]
    if node.op_type == "MatMul":
        product = ir.Node("", "MatMul", inputs, attributes, name=node.name)
        made = [product, ir.node("Add", [product.outputs[0], bias])]
    else:
        made = [ir.Node("", node.op_type, [*inputs, bias], attributes, name=node.name)]
    gone = [node, *use.tail.nodes]
    ir.convenience.replace_nodes_and_values(graph, node, gone, made, [use.output], [made[-1].outputs[0]])


def _tensor(use: Use) -> ir.TensorProtocol:
    """The stored tensor of a use's weight."""
    tensor = stored(use.root)
    assert tensor is not None
    return tensor
