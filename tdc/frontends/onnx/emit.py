"""Putting blocks in place of uses in one model, and removing what nothing reads afterwards."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...errors import VerificationError
from ...ir import Block
from ...ir.verify import verify_conv
from ..program import Replacement
from .constants import known, shape_part
from .convolution import ConvolutionLine
from .line import Common, Line, Names
from .linear import LinearLine, contracts_second
from .names import unique_name
from .operators import opset
from .store import Store
from .tensors import array, behind, graphs, stored
from .uses import Use

__all__ = ["Emitter", "check_block"]

_PRIMITIVES = ("weight", "take", "concat", "add")


def check_block(block: Block) -> None:
    """Raise VerificationError for a block that this frontend cannot write."""
    line: type[Line] = ConvolutionLine if block.kind.is_conv else LinearLine
    for op in block.ops:
        if op.kind not in (*_PRIMITIVES, *line.products):
            raise VerificationError(f"the ONNX frontend cannot write '{op}'")
        if op.kind == "matmul" and op.equation is not None:
            contracts_second(op.equation)
        if op.kind == "conv":
            verify_conv(op, block)


class Emitter:
    """Replaces uses of weights in one model by blocks, and removes what nothing reads afterwards."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = opset(model)
        self.values: set[str] = set()
        self.nodes: set[str] = set()
        self._leads: dict[int | None, Common] = {}
        for graph, _ in graphs(model):
            inputs = graph.inputs
            self.values.update(v.name for v in inputs if v.name)
            if isinstance(graph, ir.Graph):
                self.values.update(graph.initializers)
            for node in graph:
                self.nodes.add(node.name or "")
                self.values.update(v.name for v in node.outputs if v.name)

    def constant(self, wanted: str, values: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """A new initializer."""
        name = unique_name(wanted, self.values)
        tensor = ir.Tensor(values, dtype=dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def replace(self, uses: tuple[Use, ...], new: Replacement, name: str, bias: np.ndarray | None) -> None:
        """Put a block in place of every use of one weight; ``name`` is the weight's, for the names of its factors.

        ``bias``: a new bias in float64, of a site with one use.
        """
        block, lead = new.block, self._leads.get(new.lead)
        store = Store(self.constant, new.factors, name, lead.store if lead else None, new.shared)
        if new.lead is not None and lead is None:
            self._leads[new.lead] = lead = Common(store)
        names = Names(self.values, self.nodes, self.opset)
        kind: type[Line] = ConvolutionLine if block.kind.is_conv else LinearLine
        for use in uses:
            inside = use.slot is None or use.slot[0] is use.node
            if not inside and bias is not None:
                self._set_slot(use, bias)
            line = kind(use, block, store, names, bias if inside else None)
            line.common = lead
            self._cut(use, *line.write())
        for use in uses:
            self.sweep(use)

    def _set_slot(self, use: Use, bias: np.ndarray) -> None:
        """Another constant for the addition behind a use."""
        assert use.slot is not None
        node, operand = use.slot
        old, tensor = node.inputs[operand], stored(use.root)
        entries = known(old)
        assert old is not None
        assert tensor is not None
        assert entries is not None
        shape = [size if size == 1 else -1 for size in entries.shape]  # there may be fewer hidden units
        values = bias.reshape(shape).astype(tensor.dtype.numpy())
        node.replace_input_with(operand, self.constant(f"{old.name}.tdc_shifted", values, tensor.dtype))
        self.drop(old)

    def _cut(self, use: Use, new: ir.Value, nodes: list[ir.Node]) -> None:
        """Put nodes in place of a use, with the name, type and place of its output."""
        old, node = use.output, use.node
        gone = [node, *(use.tail.nodes if use.tail.norm is not None else ())]
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
        nodes[-1].doc_string = node.doc_string
        self.values.discard(new.name or "")
        inputs = [value for removed in gone for value in removed.inputs if value is not None]
        ir.convenience.replace_nodes_and_values(self.graph, node, gone[::-1], nodes, [old], [new])
        for value in inputs:
            self.drop(value)

    def reorder(self, vectors: Iterable[tuple[ir.Node, int, int]], order: np.ndarray) -> None:
        """Put constants in a new order along an axis: (node, input, axis); other readers of the same constants keep
        the old ones.
        """
        for node, operand, axis in vectors:
            old = node.inputs[operand]
            assert old is not None
            source = behind(old)
            tensor = stored(source)
            assert tensor is not None
            values = np.ascontiguousarray(np.take(array(tensor), order, axis))
            node.replace_input_with(operand, self.constant(f"{source.name}.tdc_reordered", values, tensor.dtype))
            self.drop(old)

    def _freeze_shapes(self, root: ir.Value) -> None:
        """Constants in place of Shape nodes on a weight that goes."""
        tensor = stored(root)
        assert tensor is not None
        for node, _ in tuple(root.uses()):
            if node.op_type != "Shape" or node.domain != "" or node.graph is not self.graph:
                return
        for node, _ in tuple(root.uses()):
            values, old = shape_part(node, tuple(tensor.shape.numpy())), node.outputs[0]
            if not old.is_graph_output():
                old.replace_all_uses_with(self.constant(f"{old.name}.tdc_shape", values, ir.DataType.INT64))
                self.graph.remove(node, safe=True)

    def sweep(self, use: Use) -> None:
        """Remove the stored weight of a use, and the nodes on its way, as far as nothing reads them any more."""
        self._freeze_shapes(use.root)
        self.drop(use.chain[-1].outputs[0] if use.chain else use.root)

    def drop(self, value: ir.Value) -> None:
        """Remove what computes a value that nothing reads any more, back to the constants.

        Only what was made idle is handed in, so that nodes that were idle before stay.
        """
        if _is_read(value) or value.is_graph_input():
            return
        node, name = value.producer(), value.name or ""
        if node is None:
            self.graph.initializers.pop(name, None)
        elif node.graph is not None and not any(_is_read(output) for output in node.outputs):
            inputs = [entry for entry in node.inputs if entry is not None]
            self.graph.remove(node, safe=True)
            for entry in inputs:
                self.drop(entry)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
