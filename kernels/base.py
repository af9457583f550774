"""What a kernel is: the straight line that it runs, its limits, and its reference on stock operators."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tdc.ir import Block, Decline, Equation, OpKind, Window

__all__ = ["Kernel", "Line", "Match", "Windows"]

Windows = tuple[tuple[Window, ...], ...]
"""Of each convolution of a block, one for each window axis."""

_TAKE = re.compile(r"(\w+), (\w+)\[(\w+):(\w+)\]")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a kernel, as blocks print it, with axes in the place of numbers: ``t1 = take(x, order[r:i])``,
    ``t2 = matmul(t1, first)  # b i, r i -> b r``.
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    equation: Equation | None = None
    start: str = "0"
    stop: str = "0"

    @classmethod
    def parse(cls, text: str) -> Line:
        code, _, note = text.partition("#")
        output, _, call = code.strip().partition(" = ")
        kind, _, inside = call.removesuffix(")").partition("(")
        equation = Equation.parse(note) if note.strip() else None
        if kind == "take":
            found = _TAKE.fullmatch(inside)
            if found is None:
                raise ValueError(f"write 'take(value, index[start:stop])'; got {text!r}")
            activation, index, start, stop = found.groups()
            return cls(kind, output, (activation, index), equation, start, stop)
        return cls(kind, output, tuple(name.strip() for name in inside.split(",")), equation)


@dataclass(frozen=True)
class Kernel:
    """A kernel: what it computes as ``lines``, from the value ``x`` to the last output, and how it is called.

    ``factors``: names of the factors in the lines, in the order of the operator's arguments. ``operator`` gives the
    registered torch operator, which autograd, torch.compile and torch.export know, called as
    ``operator(x, *factors, bias)``; ``run`` is the same past torch's dispatch, for plain tensors that nothing watches;
    ``reference`` the same on stock operators. ``limits`` says in words what it takes. ``available`` declines where it
    cannot run on this machine, ``takes`` sizes and windows that it cannot. Kernels for convolutions, blocks of another
    ``kind``, take the windows of each behind the bias. ``device`` and ``dtypes``: torch's names of what it runs on.
    ``registered``: the operator is one of TDC's own, not a chain of torch's. ``prepare(*factors, bias)``: the call
    behind ``run`` for operands that were checked, and the numbers of inputs and outputs; see :mod:`tdc.kernels.quick`.
    """

    name: str
    lines: tuple[Line, ...]
    factors: tuple[str, ...]
    limits: str
    operator: Callable[..., Any]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    available: Callable[[], Decline | None]
    kind: OpKind = OpKind.LINEAR
    takes: Callable[[dict[str, int], Windows], Decline | None] = lambda sizes, windows: None
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    registered: bool = True
    prepare: Callable[..., tuple[Callable[[int, int, int, int], int], int, int]] | None = None

    def match(self, block: Block) -> Match | Decline:
        """Whether the block is this line, whatever its values, factors and axes are called."""
        if block.kind is not self.kind:
            wanted = self.kind.value if self.kind.is_conv else "matrix products"
            return Decline(f"{self.name}: for {wanted}, not for {block.kind.value}")
        kinds, own = [op.kind for op in block.ops], [line.kind for line in self.lines]
        if kinds != own:
            return Decline(f"{self.name}: runs {', '.join(own)}; the block {', '.join(kinds)}")
        names, axes = {"x": block.input}, {"b": "b"}
        for line, op in zip(self.lines, block.ops, strict=True):
            if not _unify((*line.inputs, line.output), (*op.inputs, op.output), names):
                return Decline(f"{self.name}: '{op}' takes other values")
            if not _same_equation(line.equation, op.equation, axes):
                return Decline(f"{self.name}: '{op}' has another equation")
        if names[self.lines[-1].output] != block.output:
            return Decline(f"{self.name}: the block gives {block.output}")
        foreign = [names[name] for name in self.factors if names[name] not in dict(block.factors)]
        if foreign:
            return Decline(f"{self.name}: {foreign[0]} is no factor")
        sizes = {"0": 0, **{axis: dict(block.sizes)[name] for axis, name in axes.items() if axis != "b"}}
        for line, op in zip(self.lines, block.ops, strict=True):
            if (sizes[line.start], sizes[line.stop]) != (op.start, op.stop):
                return Decline(f"{self.name}: '{op}' takes other entries")
        windows = tuple(op.windows for op in block.ops if op.windows)
        refused = self.takes(sizes, windows)
        if refused is not None:
            return Decline(f"{self.name}: {refused.reason}")
        return Match(self, tuple(names[name] for name in self.factors), tuple(sorted(sizes.items())), windows)


@dataclass(frozen=True)
class Match:
    """A kernel for a block. ``factors``: names of the block's factors, in the order in which the kernel takes them.
    ``sizes`` of the kernel's axes; ``windows`` of the convolutions.
    """

    kernel: Kernel
    factors: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    windows: Windows = ()

    def __call__(self, x: Any, factors: Mapping[str, Any], bias: Any = None) -> Any:
        return self.kernel.operator(x, *self._operands(factors, bias))

    def run(self, x: Any, factors: Mapping[str, Any], bias: Any = None) -> Any:
        """The same past torch's dispatch."""
        return self.kernel.run(x, *self._operands(factors, bias))

    def reference(self, x: Any, factors: Mapping[str, Any], bias: Any = None) -> Any:
        """The same by stock operators."""
        return self.kernel.reference(x, *self._operands(factors, bias))

    def _operands(self, factors: Mapping[str, Any], bias: Any) -> list[Any]:
        own = [factors[name] for name in self.factors]
        return [*own, bias, self.windows] if self.windows else [*own, bias]


def _unify(names: tuple[str, ...], found: tuple[str, ...], known: dict[str, str]) -> bool:
    """Whether each name can stand for what was found in its place, one for one; adds to ``known``."""
    if len(names) != len(found):
        return False
    for name, other in zip(names, found, strict=True):
        if known.setdefault(name, other) != other:
            return False
    return len(set(known.values())) == len(known)


def _same_equation(wanted: Equation | None, found: Equation | None, axes: dict[str, str]) -> bool:
    if wanted is None or found is None:
        return wanted is found
    pairs = list(zip((*wanted.inputs, wanted.output), (*found.inputs, found.output), strict=False))
    same_length = len(wanted.inputs) == len(found.inputs)
    return same_length and all(
        [len(g) for g in one.groups] == [len(g) for g in other.groups] and _unify(one.axes, other.axes, axes)
        for one, other in pairs
    )
