"""One block as a line of ONNX nodes, in place of one use of a weight: what products and convolutions have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir import Block, Op
from .names import unique_name
from .store import Store
from .tensors import stored
from .uses import Use

__all__ = ["Attributes", "Common", "Line", "Names", "Part"]

Attributes = dict[str, int | float | str | list[int]]


@dataclass(frozen=True)
class Names:
    """The names of values and nodes that are taken, and the version of the operators."""

    values: set[str]
    nodes: set[str]
    opset: int


@dataclass(frozen=True, slots=True)
class Part:
    """A value of the line with the length of its working axis."""

    value: ir.Value
    width: int


@dataclass(eq=False)
class Common:
    """What sites with factors in common share: the initializers of the first one, and what they have computed."""

    store: Store
    parts: dict[tuple[object, ...], Part] = field(default_factory=dict)


class Line:
    """One block in place of one use.

    ``bias``: the constant bias of the replacement in float64, in the order of its outputs; None where the old operator
    keeps its own one, if it has any.
    """

    products: ClassVar[tuple[str, ...]]
    """The primitives that multiply by a factor."""

    def __init__(self, use: Use, block: Block, store: Store, names: Names, bias: np.ndarray | None) -> None:
        self.use, self.block, self.store, self.names, self.bias = use, block, store, names, bias
        tensor = stored(use.root)
        assert tensor is not None
        self.dtype = tensor.dtype
        self.new: list[ir.Node] = []
        self._by_name = {op.output: op for op in block.ops}
        self.built: dict[str, ir.Value] = {}
        self.common: Common | None = None

    def write(self) -> tuple[ir.Value, list[ir.Node]]:
        """The nodes, and the value that takes the place of the use's output."""
        shared = self.block.values_of(self.store.shared) if self.common else frozenset()
        parts = {self.block.input: self._once(None, self.entry) if self.common else self.entry()}
        for op in self.block.ops:
            if op.rebuild is not None:
                self.built[op.output] = self.weight(op)
                continue
            make = partial(self._primitive(op.kind), op, [parts[name] for name in op.inputs if name in parts])
            parts[op.output] = self._once(op, make) if op.output in shared else make()
        return self.finished(parts[self.block.output]).value, self.new

    def _once(self, op: Op | None, make: Callable[[], Part]) -> Part:
        """What other sites have computed from the same activation, made where they have not."""
        assert self.common is not None
        key = (self.use.activation, self.use.form.input_last, self.use.form.output_last, op)
        if key not in self.common.parts:
            self.common.parts[key] = make()
        return self.common.parts[key]

    def _primitive(self, kind: str) -> Callable[[Op, list[Part]], Part]:
        others = {"take": self.take, "concat": self.concat, "add": self.add}
        return self.product if kind in self.products else others[kind]

    @property
    def axis(self) -> int:
        """The working axis as the operators of this opset want it."""
        raise NotImplementedError

    def entry(self) -> Part:
        """The activation."""
        raise NotImplementedError

    def product(self, op: Op, parts: list[Part]) -> Part:
        raise NotImplementedError

    def finished(self, part: Part) -> Part:
        """The end of the line with what is still to be done for the bias."""
        raise NotImplementedError

    def width(self, name: str) -> int:
        """Length of a value's working axis."""
        raise NotImplementedError

    def weight(self, op: Op) -> ir.Value:
        """The dense weight in canonical axes, by nodes with constant inputs: a runtime folds them when it loads the
        model, or runs them at every call.
        """
        assert op.rebuild is not None
        sizes, whole = dict(self.block.sizes), None
        for k, piece in enumerate(op.rebuild.pieces):
            operands = [
                self.store.window(name, tuple(sizes[axis] for axis in term.axes), self.dtype)
                for name, term in zip(piece.operands, piece.equation.inputs, strict=True)
            ]
            label, text = f"{op.output}{k}", piece.equation.subscripts()
            flat = [sizes[axis] for axis in op.rebuild.output.axes]
            part = self._constant_node("Einsum", label, operands, flat, {"equation": text})
            shape = list(op.rebuild.output.shape(sizes))
            target = self.store.integers("shape", shape)
            part = self._constant_node("Reshape", f"{label}_whole", [part, target], shape)
            whole = part if whole is None else self._constant_node("Add", f"{label}_sum", [whole, part], shape)
        assert whole is not None
        wanted = [sizes["o"], sizes["i"]]
        if "g" not in sizes and list(whole.shape or ()) != wanted:
            ends = [self.store.integers("slice", numbers) for numbers in ([0, 0], wanted, [0, 1])]
            whole = self._constant_node("Slice", f"{op.output}_kept", [whole, *ends], wanted)
        return whole

    def _constant_node(
        self, kind: str, label: str, inputs: list[ir.Value], shape: list[int], attributes: Attributes | None = None
    ) -> ir.Value:
        return self.node(kind, label, inputs, 0, attributes, ir.Shape(shape)).value

    def node(
        self,
        kind: str,
        label: str,
        inputs: list[ir.Value],
        width: int,
        attributes: Attributes | None = None,
        shape: ir.Shape | None = None,
    ) -> Part:
        """Append one node; its name and its value's come from the old node's and ``label``.

        The shape is that of the first input that has one, with another length of the working axis.
        """
        old, output = self.use.node, self.use.output
        name = unique_name(f"{old.name or output.name}.tdc_{label}", self.names.nodes)
        made = ir.node(kind, inputs, attributes or {}, name=name, metadata_props=dict(old.metadata_props))
        value = made.outputs[0]
        value.name = unique_name(f"{output.name}.tdc_{label}", self.names.values)
        value.type = self.use.activation.type or ir.TensorType(self.dtype)
        value.shape = shape or self._shape(inputs, width)
        self.new.append(made)
        return Part(value, width)

    def _shape(self, inputs: list[ir.Value], width: int) -> ir.Shape | None:
        moving = next(value for value in inputs if value.const_value is None or value.is_graph_input())
        if moving.shape is None:
            return None
        sizes = list(moving.shape)
        sizes[self.axis] = width
        return ir.Shape(sizes)

    def take(self, op: Op, parts: list[Part]) -> Part:
        """Entries of the working axis; nothing at all if they are all entries in order."""
        if self.is_identity(op):
            return parts[0]
        index = self.store.index(op.inputs[1], op.start, op.stop)
        return self.node("Gather", op.output, [parts[0].value, index], op.stop - op.start, {"axis": self.axis})

    def concat(self, op: Op, parts: list[Part]) -> Part:
        width = sum(part.width for part in parts)
        return self.node("Concat", op.output, [part.value for part in parts], width, {"axis": self.axis})

    def add(self, op: Op, parts: list[Part]) -> Part:
        return self.node("Add", op.output, [part.value for part in parts], parts[0].width)

    def end(self) -> str:
        """The value that is the block's output, identity gathers left out."""
        name = self.block.output
        while (op := self._by_name.get(name)) is not None and op.kind == "take" and self.is_identity(op):
            name = op.inputs[0]
        return name

    def maker(self, name: str) -> Op | None:
        """The op that makes a value."""
        return self._by_name.get(name)

    def readers(self, name: str) -> int:
        """How many inputs of ops a value is."""
        return sum(op.inputs.count(name) for op in self.block.ops)

    def is_identity(self, op: Op) -> bool:
        index = self.store.entries(op.inputs[1], op.start, op.stop)
        return len(index) == self.width(op.inputs[0]) and bool((index == np.arange(len(index))).all())

    def narrow(self, op: Op) -> int:
        """Length of the working axis behind an op that is no product."""
        if op.kind == "take":
            return op.stop - op.start
        return sum(self.width(name) for name in (op.inputs if op.kind == "concat" else op.inputs[:1]))
