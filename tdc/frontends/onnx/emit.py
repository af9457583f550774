"""How a block is written in standard ONNX operators, in place of one use of its weight.

A use with its output axis last (``y = x W^T``) works on the last axis, one with the output axis second to last
(``y = W x``) on the second to last. Factors are stored the way the product wants them, so that no node has only
constant inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import VerificationError
from ...ir import Block, Equation, Op
from .match import NEGATIVE_AXES_OPSET, Use, opset
from .names import unique_name
from .tensors import FLOATS, array, behind, constant_tensor, graphs, stored, to_numpy

__all__ = ["PRIMITIVES", "Emitter", "check_block"]


def check_block(block: Block) -> None:
    """Raise VerificationError for a block that this frontend cannot write."""
    for op in block.ops:
        if op.kind not in PRIMITIVES:
            raise VerificationError(f"the ONNX frontend cannot write '{op}'")
        if op.equation is not None:
            _contracts_second(op.equation)


def _contracts_second(equation: Equation) -> bool:
    """Whether the factor of ``b i, r i -> b r`` is stored with the contracted axis second. Raises VerificationError."""
    if len(equation.inputs) == 2 and all(len(term.groups) == 2 for term in (*equation.inputs, equation.output)):
        (rows, inner), (first, second) = (term.groups for term in equation.inputs)
        kept, outer = equation.output.groups
        if rows == kept and (first, second) in ((outer, inner), (inner, outer)):
            return second == inner
    raise VerificationError(f"the ONNX frontend cannot write a product '{equation}'")


class Emitter:
    """Replaces uses of weights in one model by blocks, and removes what nothing reads afterwards."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = opset(model)
        self.values: set[str] = set()
        self.nodes: set[str] = set()
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

    def replace(self, uses: tuple[Use, ...], block: Block, factors: Mapping[str, Tensor], name: str) -> None:
        """Put ``block`` in place of every use of one weight; ``name`` is the weight's, for the names of its factors."""
        store = _Store(self, factors, name)
        for use in uses:
            _Line(self, use, block, store).write()
        for use in uses:
            self.sweep(use)

    def reorder(self, vectors: Iterable[tuple[ir.Node, int]], order: np.ndarray) -> None:
        """Put constant vectors in a new order along their last axis; other readers of the same constants keep
        the old ones.
        """
        for node, operand in vectors:
            old = node.inputs[operand]
            assert old is not None
            source = behind(old)
            tensor = stored(source)
            assert tensor is not None
            values = np.ascontiguousarray(array(tensor)[..., order])
            node.replace_input_with(operand, self.constant(f"{source.name}.tdc_reordered", values, tensor.dtype))
            while old is not source and not _is_read(old):
                copy = old.producer()
                assert copy is not None
                old = copy.inputs[0] or source
                self.graph.remove(copy, safe=True)
            self.drop(source)

    def sweep(self, use: Use) -> None:
        """Remove the stored weight of a use, and the nodes on its way, as far as nothing reads them any more."""
        for node in reversed(use.chain):
            if node.graph is not None and not _is_read(node.outputs[0]):
                self.graph.remove(node, safe=True)
        self.drop(use.root)

    def drop(self, value: ir.Value) -> None:
        """Remove a constant that nothing reads any more."""
        if _is_read(value) or value.is_graph_input():
            return
        node, name = value.producer(), value.name or ""
        if node is not None and node.graph is not None and constant_tensor(node) is not None:
            self.graph.remove(node, safe=True)
        elif node is None and name in self.graph.initializers:
            del self.graph.initializers[name]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


class _Store:
    """The factors of one weight as initializers: each stored once per orientation that is needed."""

    def __init__(self, emitter: Emitter, factors: Mapping[str, Tensor], name: str) -> None:
        self.emitter, self.factors, self.name = emitter, factors, name
        self._known: dict[tuple[object, ...], ir.Value] = {}

    def matrix(self, factor: str, transposed: bool, dtype: ir.DataType) -> ir.Value:
        key = (factor, transposed)
        if key not in self._known:
            values = to_numpy(self.factors[factor].T if transposed else self.factors[factor], dtype)
            self._known[key] = self.emitter.constant(f"{self.name}.tdc_{factor}", values, dtype)
        return self._known[key]

    def index(self, factor: str, start: int, stop: int) -> ir.Value:
        key = (factor, start, stop)
        if key not in self._known:
            values = self.entries(factor, start, stop)
            suffix = "" if len(values) == len(self.factors[factor]) else f"_{start}"
            self._known[key] = self.emitter.constant(f"{self.name}.tdc_{factor}{suffix}", values, ir.DataType.INT32)
        return self._known[key]

    def entries(self, factor: str, start: int, stop: int) -> np.ndarray:
        return to_numpy(self.factors[factor][start:stop], ir.DataType.INT32)

    def scalar(self, what: str, number: float, dtype: ir.DataType) -> ir.Value:
        key = (what, number)
        if key not in self._known:
            values = np.asarray(number, dtype=dtype.numpy())
            self._known[key] = self.emitter.constant(f"{self.name}.tdc_{what}", values, dtype)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class _Part:
    """A value of the line with the length of its working axis."""

    value: ir.Value
    width: int


class _Line:
    """One block in place of one use."""

    def __init__(self, emitter: Emitter, use: Use, block: Block, store: _Store) -> None:
        self.emitter, self.use, self.block, self.store = emitter, use, block, store
        self.last = use.linear.output_last
        self.gemm = use.node.op_type == "Gemm"
        self.output = use.node.outputs[0]
        tensor = stored(use.root)
        assert tensor is not None
        self.dtype = tensor.dtype
        self.new: list[ir.Node] = []
        self.finished = False

    def write(self) -> None:
        """Write the nodes, and give the old output's name, type and place to the last of them."""
        node = self.use.node
        result = self._bias(self._ops())
        old, new = self.output, result.value
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
        self.new[-1].doc_string = node.doc_string
        self.emitter.values.discard(new.name or "")
        bias = node.inputs[2] if self.gemm and len(node.inputs) > 2 else None
        ir.convenience.replace_nodes_and_values(self.emitter.graph, node, [node], self.new, [old], [new])
        if bias is not None:
            self.emitter.drop(bias)

    def _ops(self) -> _Part:
        axes = dict(self.block.sizes)
        parts = {self.block.input: self._entry(axes["i"])}
        for op in self.block.ops:
            parts[op.output] = PRIMITIVES[op.kind](self, op, [parts[name] for name in op.inputs if name in parts])
        return parts[self.block.output]

    def _entry(self, width: int) -> _Part:
        """The activation with its input axis where the output axis will be; a Transpose if a Gemm has them crossed."""
        activation = self.use.activation
        if self.use.linear.input_last == self.last:
            return _Part(activation, width)
        part = _Part(activation, width)
        shape = None if activation.shape is None else ir.Shape(list(activation.shape)[::-1])
        return self.node("Transpose", "x", [part.value], width, {"perm": [1, 0]}, shape=shape)

    def node(
        self,
        kind: str,
        label: str,
        inputs: list[ir.Value],
        width: int,
        attributes: Mapping[str, int | float | list[int]] | None = None,
        shape: ir.Shape | None = None,
    ) -> _Part:
        """Append one node; its name and its value's come from the old node's and ``label``."""
        emitter, old = self.emitter, self.use.node
        name = unique_name(f"{old.name or self.output.name}.tdc_{label}", emitter.nodes)
        made = ir.node(kind, inputs, attributes or {}, name=name, metadata_props=dict(old.metadata_props))
        value = made.outputs[0]
        value.name = unique_name(f"{self.output.name}.tdc_{label}", emitter.values)
        value.type = self.use.activation.type or ir.TensorType(self.dtype)
        value.shape = shape or self._shape(width)
        self.new.append(made)
        return _Part(value, width)

    def _shape(self, width: int) -> ir.Shape | None:
        shape = self.use.activation.shape
        if shape is None:
            return None
        sizes = list(shape)
        if self.use.linear.input_last != self.last:
            sizes = sizes[::-1]
        sizes[self.axis if self.axis < 0 else len(sizes) - (1 if self.last else 2)] = width
        return ir.Shape(sizes)

    @property
    def axis(self) -> int:
        """The working axis as the operators of this opset want it."""
        axis = -1 if self.last else -2
        if self.emitter.opset >= NEGATIVE_AXES_OPSET:
            return axis
        assert self.use.rank is not None
        return self.use.rank + axis

    def matmul(self, op: Op, parts: list[_Part]) -> _Part:
        """``b i, r i -> b r``: the factor on the right, transposed, or on the left as it is."""
        assert op.equation is not None
        second = _contracts_second(op.equation)
        (part,) = parts
        factor = self.store.matrix(op.inputs[1], second == self.last, self.dtype)
        width = int(self.store.factors[op.inputs[1]].shape[0 if second else 1])
        inputs = [part.value, factor] if self.last else [factor, part.value]
        if self.gemm and op.output == self._end():
            return self._gemm(op, inputs, width)
        return self.node("MatMul", op.output, inputs, width)

    def _end(self) -> str:
        """The value that is the block's output, identity gathers left out."""
        end, by_name = self.block.output, {op.output: op for op in self.block.ops}
        while end in by_name and by_name[end].kind == "take" and self._is_identity(by_name[end]):
            end = by_name[end].inputs[0]
        return end

    def _is_identity(self, op: Op) -> bool:
        index = self.store.entries(op.inputs[1], op.start, op.stop)
        return len(index) == self._width(op.inputs[0]) and bool((index == np.arange(len(index))).all())

    def _width(self, name: str) -> int:
        if name == self.block.input:
            return dict(self.block.sizes)["i"]
        op = next(op for op in self.block.ops if op.output == name)
        if op.kind == "take":
            return op.stop - op.start
        if op.kind == "concat":
            return sum(self._width(part) for part in op.inputs)
        if op.equation is not None:
            return int(self.store.factors[op.inputs[1]].shape[0 if _contracts_second(op.equation) else 1])
        return self._width(op.inputs[0])

    def _gemm(self, op: Op, inputs: list[ir.Value], width: int) -> _Part:
        """The last product takes over the scales and the bias of the old Gemm."""
        self.finished = True
        alpha, beta, bias = self._scales()
        if bias is None and alpha == 1.0:
            return self.node("MatMul", op.output, inputs, width)
        attributes: dict[str, int | float | list[int]] = {}
        if alpha != 1.0:
            attributes["alpha"] = alpha
        if beta != 1.0 and bias is not None:
            attributes["beta"] = beta
        return self.node("Gemm", op.output, [*inputs, bias] if bias is not None else inputs, width, attributes)

    def _scales(self) -> tuple[float, float, ir.Value | None]:
        node = self.use.node
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        return alpha, beta, node.inputs[2] if len(node.inputs) > 2 else None

    def take(self, op: Op, parts: list[_Part]) -> _Part:
        """Entries of the working axis; nothing at all if they are all entries in order."""
        if self._is_identity(op):
            return parts[0]
        index = self.store.index(op.inputs[1], op.start, op.stop)
        return self.node("Gather", op.output, [parts[0].value, index], op.stop - op.start, {"axis": self.axis})

    def concat(self, op: Op, parts: list[_Part]) -> _Part:
        width = sum(part.width for part in parts)
        return self.node("Concat", op.output, [part.value for part in parts], width, {"axis": self.axis})

    def add(self, op: Op, parts: list[_Part]) -> _Part:
        return self.node("Add", op.output, [part.value for part in parts], parts[0].width)

    def _bias(self, part: _Part) -> _Part:
        """``alpha y + beta C`` of a Gemm whose block does not end in a product; constants are folded."""
        if not self.gemm or self.finished:
            return part
        alpha, beta, bias = self._scales()
        if alpha != 1.0:
            scale = self.store.scalar("alpha", alpha, self.dtype)
            part = self.node("Mul", "scaled", [part.value, scale], part.width)
        if bias is None or beta == 0.0:
            return part
        if beta != 1.0:
            bias = self._scaled(bias, beta)
        return self.node("Add", "biased", [part.value, bias], part.width)

    def _scaled(self, bias: ir.Value, beta: float) -> ir.Value:
        tensor = stored(bias)
        if tensor is not None and not bias.is_graph_input() and tensor.dtype in FLOATS:
            dtype = tensor.dtype.numpy()
            values = np.asarray(array(tensor) * np.asarray(beta, dtype=dtype), dtype=dtype)
            return self.emitter.constant(f"{bias.name}.tdc_scaled", values, tensor.dtype)
        factor = self.store.scalar("beta", beta, self.dtype)
        return self.node("Mul", "bias", [bias, factor], 1, shape=bias.shape).value


PRIMITIVES: Mapping[str, Callable[[_Line, Op, list[_Part]], _Part]] = {
    "matmul": _Line.matmul,
    "take": _Line.take,
    "concat": _Line.concat,
    "add": _Line.add,
}
"""Block primitive -> how it is written."""
