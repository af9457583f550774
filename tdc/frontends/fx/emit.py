"""Blocks as ATen nodes in place of the uses of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import VerificationError
from ...ir import Block, Op, Rebuild, Window, contraction, conv_groups, conv_shape
from ..graph import built, memory_format
from ..program import Replacement
from .match import Norm, Use

__all__ = ["Emitter", "casts"]

aten = torch.ops.aten
_CONVOLVE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")

Constant = Callable[[str, Tensor], fx.Node]
Kernels = Callable[[Block, Mapping[str, Tensor], Tensor | None, Tensor], Callable[..., Any] | None]
"""What runs a block with these factors and this bias on such a value, called with the value, the factors by name and
the bias; None where the block's own operators do.
"""


def casts(graph: fx.Graph) -> bool:
    """Whether the graph goes through autocast, of which kernels know nothing."""
    return any("autocast" in str(node.target) for node in graph.nodes)


@dataclass(eq=False)
class Emitter:
    """Writes blocks into one graph. ``constant`` makes a node that gives a tensor; equal names give the same node.

    No node that it writes has only constant inputs: what follows from constants alone (slices of an index, a kernel
    with all its window axes, a bias with all axes of the activation) is worked out here.
    """

    graph: fx.Graph
    constant: Constant
    kernels: Kernels | None = None
    values: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)
    """What sites with factors in common have computed: by site, activation, dtype and op."""
    _known: dict[str, fx.Node] = field(default_factory=dict)

    @cached_property
    def casts(self) -> bool:
        return casts(self.graph)

    def replace(self, use: Use, norm: Norm | None, new: Replacement, name: str, lead: str, bias: Tensor | None) -> None:
        """Put a block in place of one use, and of the normalisation behind it. ``name`` is the weight's, ``lead`` that
        with which it shares factors; ``bias``: a new one in the order of the block's output, None to keep the use's
        own.
        """
        line = _Line(self, use, new, name, lead, bias)
        old = use.node if norm is None else norm.output
        with self.graph.inserting_before(use.node):
            written = line.write()
        if "val" in old.meta:
            written.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(written)
        for node in (old, *(() if norm is None else (norm.node, use.node))):
            if node.graph is self.graph and not node.users and not node._erased:
                self.graph.erase_node(node)

    def held(self, name: str, make: Callable[[], Tensor]) -> fx.Node:
        if name not in self._known:
            made = make()
            self._known[name] = self.constant(name, made if memory_format(made) is not None else made.contiguous())
        return self._known[name]


class _Line:
    """One block in place of one use."""

    def __init__(self, emitter: Emitter, use: Use, new: Replacement, name: str, lead: str, bias: Tensor | None) -> None:
        self.emitter, self.use, self.name, self.lead = emitter, use, name, lead
        self.block, self.factors, self.shared = new.block, new.factors, new.shared
        block = new.block
        self.common = block.values_of(new.shared) if new.shared else frozenset()
        self.bias, self.conv = bias, block.kind.is_conv
        self.axes = len(block.kind.windows)
        self.axis = 1 if self.conv else -1
        value = use.activation.meta.get("val")
        self.unbatched = self.conv and isinstance(value, Tensor) and value.ndim == self.axes + 1
        self.last_format = isinstance(value, Tensor) and memory_format(value) is not None
        self.values: dict[str, fx.Node] = {}

    def write(self) -> fx.Node:
        entry = self.use.activation
        kernel = self.kernel()
        if kernel is not None:
            return self.added(self.by_kernel(kernel, entry))
        self.values[self.block.input] = self.call(aten.unsqueeze.default, entry, 0) if self.unbatched else entry
        emit = {
            "matmul": self.matmul,
            "contract": self.contract,
            "conv": self.convolution,
            "take": self.take,
            "concat": self.concat,
            "add": self.add,
        }
        for op in self.block.ops:
            if op.rebuild is not None:
                self.weight(op.output, op.rebuild)
                continue
            if op.kind not in emit:
                raise VerificationError(f"the fx frontend cannot write '{op}'")
            self.values[op.output] = self.once(op, emit[op.kind])
        result = self.values[self.block.output]
        last = next((op for op in self.block.ops if op.output == self.block.output), None)
        if last is None or last.equation is None:
            result = self.biased(result)
        if self.unbatched:
            result = self.call(aten.squeeze.dim, result, 0)
        return self.added(result)

    def added(self, result: fx.Node) -> fx.Node:
        return result if self.use.rest is None else self.call(aten.add.Tensor, self.use.rest, result)

    def kernel(self) -> Callable[..., Any] | None:
        value, kernels = self.use.activation.meta.get("val"), self.emitter.kernels
        if kernels is None or self.common or self.unbatched or not isinstance(value, Tensor) or self.emitter.casts:
            return None
        given = self.use.node.meta.get("val")
        if self.use.dtype not in (None, value.dtype) or (isinstance(given, Tensor) and given.dtype != value.dtype):
            return None
        return kernels(self.block, self.factors, self.bias_of_block(), value)

    def by_kernel(self, kernel: Callable[..., Any], entry: fx.Node) -> fx.Node:
        """One operator of TDC's own."""
        tracer = fx.proxy.GraphAppendingTracer(self.emitter.graph)
        factors = {name: self.held(name, lambda name=name: self.factors[name]) for name, _ in self.block.factors}  # type: ignore[misc]
        bias = self.own_bias()
        proxies = {name: fx.Proxy(node, tracer) for name, node in factors.items()}
        made = kernel(fx.Proxy(entry, tracer), proxies, None if bias is None else fx.Proxy(bias, tracer))
        return self.told(made.node)

    def once(self, op: Op, emit: Callable[[Op], fx.Node]) -> fx.Node:
        """What an op gives; of one that other sites have too, what it gave there."""
        if op.output not in self.common:
            return emit(op)
        key = (self.lead, self.use.activation, self.use.dtype, op)
        if key not in self.emitter.values:
            self.emitter.values[key] = emit(op)
        return self.emitter.values[key]

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.told(self.emitter.graph.call_function(target, args))

    def told(self, node: fx.Node) -> fx.Node:
        """With what is known of where the use came from."""
        node.meta.update({key: self.use.node.meta[key] for key in _KEPT_META if key in self.use.node.meta})
        return node

    def held(self, part: str, make: Callable[[], Tensor], factor: str = "") -> fx.Node:
        """A constant in the dtype in which the use reads its weight; made of ``factor``, by default of that name."""

        def cast() -> Tensor:
            made = make()
            return made.to(self.use.dtype) if self.use.dtype is not None and made.is_floating_point() else made

        name = self.lead if (factor or part) in self.shared else self.name
        return self.emitter.held(f"{name}_{part}", cast)

    def operand(self, name: str, form: Callable[[Tensor], Tensor]) -> fx.Node:
        """A factor in the form that its operator takes, or the weight that was built."""
        return self.values[name] if name in self.values else self.held(name, lambda: form(self.factors[name]))

    def weight(self, name: str, shape: Rebuild) -> None:
        """The dense weight: a constant, or by nodes that build it at every call."""
        sizes = dict(self.block.sizes)
        if self.block.execution == "stored":
            self.values[name] = self.held(name, lambda: built(shape, self.factors, sizes))
            return
        whole: fx.Node | None = None
        for piece in shape.pieces:
            operands = [self.held(part, lambda part=part: self.factors[part]) for part in piece.operands]  # type: ignore[misc]
            apart = [
                self.call(aten.reshape.default, node, [sizes[axis] for axis in term.axes])
                for node, term in zip(operands, piece.equation.inputs, strict=True)
            ]
            product = self.call(aten.einsum.default, piece.equation.subscripts(), apart)
            product = self.call(aten.reshape.default, product, list(shape.output.shape(sizes)))
            whole = product if whole is None else self.call(aten.add.Tensor, whole, product)
        if "g" not in sizes:
            for axis, size in enumerate((sizes["o"], sizes["i"])):
                whole = self.call(aten.slice.Tensor, whole, axis, 0, size)
        assert whole is not None
        self.values[name] = whole

    # ---- primitives

    def matmul(self, op: Op) -> fx.Node:
        factor = self.operand(op.inputs[1], lambda stored: stored)
        bias = self.own_bias() if op.output == self.block.output else None
        return self.call(aten.linear.default, self.values[op.inputs[0]], factor, *([] if bias is None else [bias]))

    def contract(self, op: Op) -> fx.Node:
        sizes, axes = dict(self.block.sizes), op.equation.inputs[1].axes  # type: ignore[union-attr]
        split, text = contraction(op, sizes)
        shape = [sizes[axis] for axis in axes]
        factor = self.held(op.inputs[1], lambda: self.factors[op.inputs[1]].reshape(shape))
        activation = self.values[op.inputs[0]]
        missing = math.prod(split) - sizes["i"]
        if op.inputs[0] == self.block.input and missing:
            activation = self.call(aten.constant_pad_nd.default, activation, [0, missing], 0.0)
        parts = self.call(aten.unflatten.int, activation, -1, list(split))
        result = self.call(aten.einsum.default, text, [parts, factor])
        count = len(op.equation.output.groups[1])  # type: ignore[union-attr]
        result = self.call(aten.flatten.using_ints, result, -count, -1)
        if op.stop:
            result = self.call(aten.slice.Tensor, result, -1, 0, op.stop)
        return self.biased(result) if op.output == self.block.output else result

    def convolution(self, op: Op) -> fx.Node:
        kernel = self.operand(
            op.inputs[1], lambda stored: _in_format(stored.reshape(conv_shape(op, tuple(stored.shape))), stored)
        )
        activation = self.values[op.inputs[0]]
        pads = [_fixed(window) for window in op.windows]
        if any(before != after for before, after in pads):
            wanted = [size for pair in reversed(pads) for size in pair]
            activation = self.call(aten.constant_pad_nd.default, activation, wanted, 0.0)
            pads = [(0, 0)] * len(pads)
        bias = self.own_bias() if op.output == self.block.output else None
        strides, dilations = [w.stride for w in op.windows], [w.dilation for w in op.windows]
        before, groups = [first for first, _ in pads], conv_groups(op, dict(self.block.sizes))
        return self.call(_CONVOLVE[self.axes], activation, kernel, bias, strides, before, dilations, groups)

    def take(self, op: Op) -> fx.Node:
        name, stored = op.inputs[1], self.factors[op.inputs[1]]
        whole = (op.start, op.stop) == (0, len(stored))
        part = name if whole else f"{name}_{op.start}_{op.stop}"
        index = self.held(part, lambda: stored[op.start : op.stop], name)
        activation = self.values[op.inputs[0]]
        if not (self.conv and self.last_format):
            return self.call(aten.index_select.default, activation, self.axis, index)
        # Along the last axis of the memory, so that the result lies channels-last as well.
        last = self.call(aten.movedim.int, activation, 1, -1)
        return self.call(aten.movedim.int, self.call(aten.index_select.default, last, -1, index), -1, 1)

    def concat(self, op: Op) -> fx.Node:
        return self.call(aten.cat.default, [self.values[name] for name in op.inputs], self.axis)

    def add(self, op: Op) -> fx.Node:
        return self.call(aten.add.Tensor, *(self.values[name] for name in op.inputs))

    # ---- bias

    def bias_of_block(self) -> Tensor | None:
        """One like that which the block gets."""
        if self.bias is not None or self.use.bias is None:
            return self.bias
        return torch.zeros(dict(self.block.sizes)["o"])

    def own_bias(self) -> fx.Node | None:
        """One number per output."""
        bias = self.bias
        return self.use.bias if bias is None else self.held("bias", lambda: bias)

    def biased(self, result: fx.Node) -> fx.Node:
        """The result of a block that does not end in a product, with the bias added."""
        bias, ends = self.bias, [1] * (self.axes if self.conv else 0)
        if bias is not None:
            return self.call(aten.add.Tensor, result, self.held("bias", lambda: bias.reshape(-1, *ends)))
        if self.use.bias is None:
            return result
        own = self.use.bias
        if ends:
            own = self.call(aten.reshape.default, own, [-1, *ends])
        return self.call(aten.add.Tensor, result, own)


def _fixed(window: Window) -> tuple[int, int]:
    if window.auto:
        raise VerificationError(f"the fx frontend cannot write the automatic padding of {window}")
    return window.before, window.after


def _in_format(kernel: Tensor, stored: Tensor) -> Tensor:
    """The kernel in the memory format of the factor that it was."""
    wanted = memory_format(stored)
    return kernel if wanted is None or kernel.ndim != stored.ndim else kernel.contiguous(memory_format=wanted)
