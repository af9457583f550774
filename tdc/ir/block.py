"""Blocks: the replacement of a site, a typed straight line of few primitives that every frontend can emit.

Primitives (``b`` stands for all leading axes of the activation, for convolutions for example and position):

==========  ===========================================================================================
``matmul``  inputs (activation, factor), with its equation, e.g. ``b i, r i -> b r``
``contract`` the same with several axes in one: ``b (i1 i2), r o2 i1 i2 -> b (i1 r o2)``; the input of the block has
            zeros behind it where the axes hold more, and its output has more behind it that is cut off
``conv``    the same for convolutions, with its windows, e.g. ``b g i p q, (g r) i p q -> b g r``; axes that activation,
            factor and output share lie in front and are groups
``weight``  inputs the factors: the dense weight in canonical axes, by the rebuild equation of the layout; a matmul or
            conv with the dense equation applies it
``take``    inputs (activation, index factor): entries ``index[start:stop]`` of the channel axis
``concat``  inputs (activation, activation, ...): side by side along the channel axis
``add``     inputs (activation, activation): elementwise sum
==========  ===========================================================================================

The channel axis is the last one of a ``linear`` block, axis 1 of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from .equation import Equation
from .layout import Rebuild
from .site import OpKind
from .window import Window

__all__ = ["PRIMITIVES", "Block", "Op", "contraction", "conv_groups", "conv_shape", "without_gather"]

PRIMITIVES = ("matmul", "contract", "conv", "weight", "take", "concat", "add")


@dataclass(frozen=True, slots=True)
class Op:
    """One primitive: ``output = kind(inputs)``. ``equation`` for matmul, contract and conv, ``start``/``stop`` for
    take; a contract keeps ``stop`` entries of its output (0: all).

    ``windows`` of a conv: one for each window axis of the site's kind; those that its factor lacks have one tap.
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    equation: Equation | None = None
    start: int = 0
    stop: int = 0
    windows: tuple[Window, ...] = ()
    rebuild: Rebuild | None = None

    def __str__(self) -> str:
        if self.rebuild is not None:
            return f"{self.output} = weight({', '.join(self.inputs)})  # {self.rebuild}"
        if self.kind == "take":
            return f"{self.output} = take({self.inputs[0]}, {self.inputs[1]}[{self.start}:{self.stop}])"
        text = f"{self.output} = {self.kind}({', '.join(self.inputs)})"
        slides = [str(window) for window in self.windows if not window.trivial]
        notes = [str(self.equation)] if self.equation else []
        return f"{text}  # {'; '.join(notes + slides)}" if notes else text


@dataclass(frozen=True)
class Block:
    """A straight line of primitives from the activation ``x`` to the value ``output``.

    ``factors`` maps the names of the factors to their shapes; names of values are single-assignment.
    """

    factors: tuple[tuple[str, tuple[int, ...]], ...]
    ops: tuple[Op, ...]
    output: str
    sizes: tuple[tuple[str, int], ...]
    input: str = "x"
    kind: OpKind = OpKind.LINEAR
    execution: str = "factored"
    """Whether the ``weight`` op, if there is one, runs when the model is loaded (``stored``) or at every call."""

    @property
    def macs(self) -> int:
        """Multiply-adds per activation row, or per output position where input and output have equal lengths."""
        return round(self.macs_at({}))

    def values_of(self, factors: Collection[str]) -> frozenset[str]:
        """The values that follow from the input and these factors alone."""
        known = {self.input, *factors}
        for op in self.ops:
            if known.issuperset(op.inputs):
                known.add(op.output)
        return frozenset(known - {self.input, *factors})

    def macs_at(self, ratios: Mapping[str, float], without: Collection[str] = ()) -> float:
        """Multiply-adds per activation row or output position; those of some values, ``without``, are not counted.

        ``ratios``: entries of the input per position of the output, along each window axis (1 where not given). A step
        runs at every position of its own output: at all entries of the axes that later steps slide over. A window axis
        is counted in the step whose factor carries it, and nowhere else.
        """
        shapes, sizes = {**dict(self.factors), **self._dense_shape()}, dict(self.sizes)
        positions = self.positions_at(ratios)
        total = 0.0
        for op in self.ops:
            if op.equation is not None and op.output not in without:
                activation, factor = (term.axes for term in op.equation.inputs)
                others = set(activation) - set(factor) - {"b"} - {window.axis for window in op.windows}
                numbers = math.prod(shapes[op.inputs[1]]) * math.prod(sizes[axis] for axis in others)
                total += numbers * positions[op.output]
        return total

    def peak_at(self, ratios: Mapping[str, float]) -> float:
        """The most numbers of activations that live at a time, per activation row or output position; see
        :meth:`macs_at`.
        """
        positions, width = self.positions_at(ratios), self.widths()
        last = {name: k for k, op in enumerate(self.ops) for name in op.inputs}
        live, most = {self.input}, 0.0
        for k, op in enumerate(self.ops):
            if op.kind == "weight":
                continue
            live.add(op.output)
            most = max(most, sum(width[name] * positions[name] for name in live))
            live -= {name for name in live if last.get(name, -1) <= k and name != self.output}
        return most

    def _dense_shape(self) -> dict[str, tuple[int, ...]]:
        """The shape of a weight that the block builds, by its name."""
        sizes, dense = dict(self.sizes), self.kind.dense.inputs[1]
        return {op.output: dense.shape(sizes) for op in self.ops if op.kind == "weight"}

    @property
    def rebuild_macs(self) -> int:
        """Multiply-adds of building the dense weight once: of contracting the factors of each piece from the left."""
        return sum(
            _chain_macs(piece.equation, dict(self.sizes))
            for op in self.ops
            if op.rebuild
            for piece in op.rebuild.pieces
        )

    def widths(self) -> dict[str, int]:
        """Channels of every value."""
        width = {self.input: self._input_width()}
        for op in (op for op in self.ops if op.kind != "weight"):
            width[op.output] = self._width(op, width)
        return width

    def positions_at(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Entries of every value per output position, channels not counted; ``ratios`` as for :meth:`macs_at`."""
        waiting = {window.axis for op in self.ops for window in op.windows if not window.trivial}
        passed: dict[str, frozenset[str]] = {self.input: frozenset()}
        for op in (op for op in self.ops if op.kind != "weight"):
            before = frozenset().union(*(passed[name] for name in op.inputs if name in passed))
            passed[op.output] = before | {window.axis for window in op.windows if not window.trivial}
        return {name: math.prod(ratios.get(axis, 1.0) for axis in waiting - done) for name, done in passed.items()}

    def _input_width(self) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in self.kind.dense.inputs[0].axes if axis in ("g", "i"))

    def _width(self, op: Op, width: Mapping[str, int]) -> int:
        """Channels of an op's output."""
        if op.kind == "take":
            return op.stop - op.start
        if op.kind == "concat":
            return sum(width[name] for name in op.inputs)
        if op.equation is None:
            return width[op.inputs[0]]
        shape = {**dict(self.factors), **self._dense_shape()}[op.inputs[1]]
        factor = op.equation.inputs[1].groups
        kept = set(op.equation.output.axes) - {"b"} - {window.axis for window in op.windows}
        if kept == set(factor[0]):
            return shape[0]
        return math.prod(dict(self.sizes)[axis] for axis in kept)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self.factors)
        lines = [f"block({self.input}; {shapes})", *(f"  {op}" for op in self.ops), f"  return {self.output}"]
        return "\n".join(lines)


def _chain_macs(equation: Equation, sizes: Mapping[str, int]) -> int:
    first, *rest = (set(term.axes) for term in equation.inputs)
    total = 0
    for k, factor in enumerate(rest):
        later = set(equation.output.axes).union(*rest[k + 1 :])
        total += math.prod(sizes[axis] for axis in first | factor)
        first = (first | factor) & later
    return total


def without_gather(block: Block) -> Block:
    """The block without the gather that ends it; its output then comes in the order of the stack."""
    *ops, last = block.ops
    if last.kind != "take" or last.output != block.output:
        raise ValueError(f"the block does not end in a gather: {last}")
    used = {name for op in ops for name in op.inputs}
    factors = tuple((name, shape) for name, shape in block.factors if name in used)
    return replace(block, factors=factors, ops=tuple(ops), output=last.inputs[0])


def conv_shape(op: Op, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a conv's factor as convolution operators take it: (outputs, inputs per group, every window axis).

    The factor is stored with only the window axes of its term; the others have one tap. One that sums over no channels
    has one input per group.
    """
    assert op.equation is not None
    windows = [window.axis for window in op.windows]
    carried = {
        group[0]: size for group, size in zip(op.equation.inputs[1].groups, shape, strict=True) if group[0] in windows
    }
    inputs = shape[1 : len(shape) - len(carried)]
    return (shape[0], *(inputs or (1,)), *(carried.get(axis, 1) for axis in windows))


def contraction(op: Op, sizes: Mapping[str, int], behind: str = "") -> tuple[tuple[int, ...], str]:
    """A contract as einsum: the sizes of the activation's axes after ``b``, and the subscripts, ``...ab,cdab->...cd``.

    ``behind``: the letter of one more axis of activation and output that comes last.
    """
    assert op.equation is not None
    activation, factor, output = (term.axes for term in (*op.equation.inputs, op.equation.output))
    letters = dict(zip((axis for axis in op.equation.axes if axis != "b"), "abcdefghijklmnopqrstuvwxy", strict=False))
    text = ["".join(letters[axis] for axis in axes if axis != "b") for axes in (activation, factor, output)]
    split = tuple(sizes[axis] for axis in activation if axis != "b")
    return split, f"...{text[0]}{behind},{text[1]}->...{text[2]}{behind}"


def conv_groups(op: Op, sizes: Mapping[str, int]) -> int:
    """The groups of a conv: the product of the axes that activation, factor and output share."""
    assert op.equation is not None
    activation, factor = (term.axes for term in op.equation.inputs)
    shared = set(activation) & set(factor) & set(op.equation.output.axes)
    return math.prod([sizes[axis] for axis in shared - {window.axis for window in op.windows}])
