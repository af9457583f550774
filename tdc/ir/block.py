"""Blocks: the replacement of a site, a typed straight line of few primitives that every frontend can emit.

Primitives (``b`` stands for all leading axes of the activation):

==========  ===========================================================================================
``matmul``  inputs (activation, factor), with its equation, e.g. ``b i, r i -> b r``
``take``    inputs (activation, index factor): entries ``index[start:stop]`` of the last axis
``concat``  inputs (activation, activation, ...): side by side along the last axis
``add``     inputs (activation, activation): elementwise sum
==========  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .equation import Equation

__all__ = ["PRIMITIVES", "Block", "Op", "without_gather"]

PRIMITIVES = ("matmul", "take", "concat", "add")


@dataclass(frozen=True, slots=True)
class Op:
    """One primitive: ``output = kind(inputs)``. ``equation`` for matmul, ``start``/``stop`` for take."""

    kind: str
    output: str
    inputs: tuple[str, ...]
    equation: Equation | None = None
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        text = f"{self.output} = {self.kind}({', '.join(self.inputs)})"
        if self.kind == "take":
            return f"{self.output} = take({self.inputs[0]}, {self.inputs[1]}[{self.start}:{self.stop}])"
        return f"{text}  # {self.equation}" if self.equation else text


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

    @property
    def macs(self) -> int:
        """Multiply-adds per activation row (axis ``b`` counted once)."""
        sizes: Mapping[str, int] = dict(self.sizes)
        rows = frozenset("b")
        return sum(op.equation.macs(sizes, without=rows) for op in self.ops if op.equation is not None)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self.factors)
        lines = [f"block({self.input}; {shapes})", *(f"  {op}" for op in self.ops), f"  return {self.output}"]
        return "\n".join(lines)


def without_gather(block: Block) -> Block:
    """The block without the gather that ends it; its output then comes in the order of the stack."""
    *ops, last = block.ops
    if last.kind != "take" or last.output != block.output:
        raise ValueError(f"the block does not end in a gather: {last}")
    used = {name for op in ops for name in op.inputs}
    factors = tuple((name, shape) for name, shape in block.factors if name in used)
    return Block(factors, tuple(ops), last.inputs[0], block.sizes, block.input)
