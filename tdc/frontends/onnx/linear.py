"""Blocks of linear sites as MatMul, Gemm, Gather, Concat and Add.

A use with its output axis last (``y = x W^T``) works on the last axis, one with the output axis second to last
(``y = W x``) on the second to last. Factors are stored the way the product wants them, so that no node has only
constant inputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import VerificationError
from ...ir import Equation, Op, contraction
from .line import Attributes, Line, Part
from .operators import NEGATIVE_AXES_OPSET
from .tail import scales
from .tensors import FLOATS, array, stored

__all__ = ["LinearLine", "contracts_second"]


def contracts_second(equation: Equation) -> bool:
    """Whether the factor of ``b i, r i -> b r`` is stored with the contracted axis second. Raises VerificationError."""
    if len(equation.inputs) == 2 and all(len(term.groups) == 2 for term in (*equation.inputs, equation.output)):
        (rows, inner), (first, second) = (term.groups for term in equation.inputs)
        kept, outer = equation.output.groups
        if rows == kept and (first, second) in ((outer, inner), (inner, outer)):
            return second == inner
    raise VerificationError(f"the ONNX frontend cannot write a product '{equation}'")


class LinearLine(Line):
    """A block in place of a MatMul or Gemm."""

    products = ("matmul", "contract")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.last = self.use.form.output_last
        self.gemm = self.use.node.op_type == "Gemm"
        self.alpha, self.beta = scales(self.use.node)
        self.scaled = False

    @property
    def axis(self) -> int:
        axis = -1 if self.last else -2
        if self.names.opset >= NEGATIVE_AXES_OPSET:
            return axis
        assert self.use.rank is not None
        return self.use.rank + axis

    def entry(self) -> Part:
        """The activation with its input axis where the output axis will be; a Transpose if a Gemm has them crossed."""
        activation, width = self.use.activation, dict(self.block.sizes)["i"]
        if self.use.form.input_last == self.last:
            return Part(activation, width)
        shape = None if activation.shape is None else ir.Shape(list(activation.shape)[::-1])
        return self.node("Transpose", "x", [activation], width, {"perm": [1, 0]}, shape=shape)

    def product(self, op: Op, parts: list[Part]) -> Part:
        """``b i, r i -> b r``: the factor on the right, transposed, or on the left as it is."""
        assert op.equation is not None
        if op.kind == "contract":
            return self._contract(op, parts[0])
        second = contracts_second(op.equation)
        factor = self._matrix(op.inputs[1], second == self.last)
        inputs = [parts[0].value, factor] if self.last else [factor, parts[0].value]
        if self.gemm and op.output == self.end():
            return self._gemm(op, inputs)
        return self.node("MatMul", op.output, inputs, self.width(op.output))

    def _matrix(self, name: str, transposed: bool) -> ir.Value:
        if name not in self.built:
            return self.store.matrix(name, transposed, self.dtype)
        if not transposed:
            return self.built[name]
        shape = list(self.built[name].shape or ())[::-1]
        return self.node("Transpose", f"{name}_t", [self.built[name]], 0, {"perm": [1, 0]}, ir.Shape(shape)).value

    def width(self, name: str) -> int:
        op = self.maker(name)
        if op is None:
            return dict(self.block.sizes)["i"]
        if self.built and op.equation is not None:
            return dict(self.block.sizes)["o"]
        if op.equation is None:
            return self.narrow(op)
        if op.kind == "contract":
            return op.stop or self._whole(op)
        return int(self.store.factors[op.inputs[1]].shape[0 if contracts_second(op.equation) else 1])

    def _whole(self, op: Op) -> int:
        assert op.equation is not None
        sizes = dict(self.block.sizes)
        return math.prod(sizes[axis] for axis in op.equation.output.groups[1])

    def _contract(self, op: Op, part: Part) -> Part:
        """Reshape, Einsum, Reshape; with zeros behind the input, and less of the output, where the axes hold more."""
        assert op.equation is not None
        sizes = dict(self.block.sizes)
        split, text = contraction(op, sizes, "" if self.last else "z")
        factor = self.store.window(op.inputs[1], tuple(sizes[axis] for axis in op.equation.inputs[1].axes), self.dtype)
        missing = math.prod(split) - part.width
        if missing:
            ends = [0] * (2 * self._rank)
            ends[self.axis] = missing
            pads = self.store.integers("pads", ends)
            part = self.node("Pad", f"{op.output}_padded", [part.value, pads], part.width + missing)
        shape = self.store.integers("split", self._around([*split]))
        apart = self.node("Reshape", f"{op.output}_split", [part.value, shape], 0, shape=self._unknown(len(split) - 1))
        new = len(op.equation.output.groups[1])
        whole = self._whole(op)
        result = self.node(
            "Einsum", op.output, [apart.value, factor], 0, {"equation": text}, shape=self._unknown(new - 1)
        )
        shape = self.store.integers("whole", self._around([whole]))
        flat = self.node("Reshape", f"{op.output}_flat", [result.value, shape], whole, shape=self._flat(whole))
        if not op.stop:
            return flat
        parts = [self.store.integers("slice", [number]) for number in (0, op.stop, self.axis)]
        return self.node("Slice", f"{op.output}_kept", [flat.value, *parts], op.stop)

    @property
    def _rank(self) -> int:
        shape = self.use.activation.shape
        assert shape is not None  # else the site's candidates were declined
        return len(shape)

    def _around(self, sizes: list[int]) -> list[int]:
        """A shape with these sizes in place of the working axis and the others as they are."""
        return [0] * (self._rank - 1) + sizes if self.last else [0] * (self._rank - 2) + sizes + [-1]

    def _unknown(self, more: int) -> ir.Shape:
        return ir.Shape([None] * (self._rank + more))

    def _flat(self, width: int) -> ir.Shape:
        sizes = list(self.use.activation.shape or ())
        if self.use.form.input_last != self.last:
            sizes.reverse()
        sizes[-1 if self.last else -2] = width
        return ir.Shape(sizes)

    def _old_bias(self) -> ir.Value | None:
        inputs = self.use.node.inputs
        return inputs[2] if self.gemm and len(inputs) > 2 else None

    def _gemm(self, op: Op, inputs: list[ir.Value]) -> Part:
        """The last product takes over the scales and the bias of the old Gemm."""
        self.scaled = True
        width, bias, beta = self.width(op.output), self._old_bias(), self.beta
        if self.bias is not None:
            bias, beta, self.bias = self.store.bias(self.bias, (-1,), self.dtype), 1.0, None
        if bias is None and self.alpha == 1.0:
            return self.node("MatMul", op.output, inputs, width)
        attributes: Attributes = {}
        if self.alpha != 1.0:
            attributes["alpha"] = self.alpha
        if beta != 1.0 and bias is not None:
            attributes["beta"] = beta
        return self.node("Gemm", op.output, [*inputs, bias] if bias is not None else inputs, width, attributes)

    def finished(self, part: Part) -> Part:
        """``alpha y + beta C`` of a Gemm whose block does not end in a product, or a new bias; constants are folded."""
        if self.scaled:
            return part
        if self.alpha != 1.0:
            scale = self.store.scalar("alpha", self.alpha, self.dtype)
            part = self.node("Mul", "scaled", [part.value, scale], part.width)
        if self.bias is not None:
            bias: ir.Value | None = self.store.bias(self.bias, (-1,), self.dtype)
        else:
            bias = self._scaled(self._old_bias())
        return part if bias is None else self.node("Add", "biased", [part.value, bias], part.width)

    def _scaled(self, bias: ir.Value | None) -> ir.Value | None:
        if bias is None or self.beta == 0.0:
            return None
        if self.beta == 1.0:
            return bias
        tensor = stored(bias)
        if tensor is not None and not bias.is_graph_input() and tensor.dtype in FLOATS:
            dtype = tensor.dtype.numpy()
            values = np.asarray(array(tensor) * np.asarray(self.beta, dtype=dtype), dtype=dtype)
            return self.store.constant(f"{bias.name}.tdc_scaled", values, tensor.dtype)
        factor = self.store.scalar("beta", self.beta, self.dtype)
        return self.node("Mul", "bias", [bias, factor], 1, shape=bias.shape).value
