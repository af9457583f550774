"""Blocks of convolution sites as Conv, Gather, Concat and Add along axis 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir import Op, Window, conv_groups, conv_shape
from .line import Attributes, Line, Part
from .tail import is_void

__all__ = ["ConvolutionLine"]

_AUTO = {"upper": "SAME_UPPER", "lower": "SAME_LOWER"}


class ConvolutionLine(Line):
    """A block in place of a Conv.

    A constant bias goes into convolutions of the block, for nothing, wherever it can: into the last one; into one that
    is added at the end; and with a concatenation ``[t, C t]`` at the end, as ``[t + b, C (t + b) + (c - C b)]``. Else
    it is added.
    """

    products = ("conv",)
    axis = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        sizes = dict(self.block.sizes)
        self.groups, self.channels = sizes["g"], sizes["g"] * sizes["i"]
        last = self.maker(self.end())
        if self.bias is None and self.use.slot is not None and (last is None or last.kind != "conv"):
            self.bias = self.use.bias if self.use.slot[0] is self.use.node else None
        self.spread: dict[str, np.ndarray] | None = None
        if self.bias is not None:
            self.spread = self._spread(self.block.output, self.bias)

    def entry(self) -> Part:
        return Part(self.use.activation, self.channels)

    def width(self, name: str) -> int:
        op = self.maker(name)
        if op is None:
            return self.channels
        if op.equation is None:
            return self.narrow(op)
        sizes = dict(self.block.sizes)
        built = op.inputs[1] in self.built
        return sizes["g"] * sizes["o"] if built else int(self.store.factors[op.inputs[1]].shape[0])

    def product(self, op: Op, parts: list[Part]) -> Part:
        (part,) = parts
        if op.inputs[1] in self.built:
            kernel = self.built[op.inputs[1]]
            shape = self.block.kind.dense.inputs[1].shape(dict(self.block.sizes))
        else:
            shape = conv_shape(op, tuple(self.store.factors[op.inputs[1]].shape))
            kernel = self.store.window(op.inputs[1], shape, self.dtype)
        inputs = [part.value, kernel]
        if self.spread is not None and op.output in self.spread:
            inputs.append(self.store.bias(self.spread[op.output], (-1,), self.dtype))
        elif op.output == self.end() and (old := self._old_bias()) is not None:
            inputs.append(old)
        attributes = _attributes(op.windows, conv_groups(op, dict(self.block.sizes)))
        return self.node("Conv", op.output, inputs, shape[0], attributes, _slid(part.value.shape, shape[0], op.windows))

    def finished(self, part: Part) -> Part:
        """A bias that no convolution of the block could take is added."""
        ends = (1, part.width, *(1 for _ in self.use.form.windows))
        if self.bias is not None:
            if self.spread is not None:
                return part
            bias = self.store.bias(self.bias, ends, self.dtype)
        else:
            old, last = self._old_bias(), self.maker(self.end())
            if old is None or last is None or last.kind == "conv":
                return part
            shape = self.store.constant(f"{self.store.name}.tdc_shape", np.array(ends), ir.DataType.INT64)
            bias = self.node("Reshape", "bias", [old, shape], part.width, shape=ir.Shape(ends)).value
        return self.node("Add", "biased", [part.value, bias], part.width)

    def _old_bias(self) -> ir.Value | None:
        """The bias of the old Conv that stays as it is."""
        node = self.use.node
        if self.bias is not None or len(node.inputs) < 3 or is_void(node):
            return None
        return node.inputs[2]

    def _spread(self, name: str, bias: np.ndarray) -> dict[str, np.ndarray] | None:
        """The biases of convolutions that together add ``bias`` to a value; None if there are none."""
        op = self.maker(name)
        if op is None:
            return None
        if op.kind == "conv":
            return {name: bias}
        if op.kind == "take":
            index = self.store.entries(op.inputs[1], op.start, op.stop)
            if len(index) != self.width(op.inputs[0]) or self.readers(op.inputs[0]) != 1:
                return None
            return self._spread(op.inputs[0], bias[np.argsort(index)])
        if op.kind == "add":
            free = [part for part in op.inputs if self._is_free(part, 1)]
            return {free[0]: bias} if free else None
        return self._halved(op, bias)

    def _halved(self, op: Op, bias: np.ndarray) -> dict[str, np.ndarray] | None:
        if len(op.inputs) != 2:
            return None
        first, second = op.inputs
        behind = self.maker(second)
        if behind is None or not self._is_free(first, 2) or not self._is_free(second, 1) or behind.inputs[0] != first:
            return None
        if not all(window.trivial for window in behind.windows):
            return None
        width = self.width(first)
        factor = self.store.factors[behind.inputs[1]].double().numpy()
        rows = factor.reshape(self.groups, -1, width // self.groups)
        carried = (rows @ bias[:width].reshape(self.groups, -1, 1)).reshape(-1)
        return {first: bias[:width], second: bias[width:] - carried}

    def _is_free(self, name: str, readers: int) -> bool:
        """Whether a convolution makes a value that only so many inputs read."""
        op = self.maker(name)
        return op is not None and op.kind == "conv" and self.readers(name) == readers


def _attributes(windows: tuple[Window, ...], groups: int) -> Attributes:
    found: Attributes = {
        "group": groups,
        "kernel_shape": [window.size for window in windows],
        "strides": [window.stride for window in windows],
        "dilations": [window.dilation if window.size > 1 else 1 for window in windows],
    }
    # An axis with stride 1 states its zeros; beside an automatic one they are those that the operator would put there.
    auto = next((window.auto for window in windows if window.auto), "")
    if auto:
        found["auto_pad"] = _AUTO[auto]
    else:
        found["pads"] = [*(window.before for window in windows), *(window.after for window in windows)]
    return found


def _slid(shape: ir.Shape | None, width: int, windows: tuple[Window, ...]) -> ir.Shape | None:
    """The shape behind a convolution."""
    if shape is None:
        return None
    pairs = zip(windows, list(shape)[2:], strict=True)
    sizes = [size if w.trivial else w.positions(size) if isinstance(size, int) else None for w, size in pairs]
    return ir.Shape([shape[0], width, *sizes])
