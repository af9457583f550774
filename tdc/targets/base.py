"""What a machine is to the compiler, and the lowering that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from ..ir import Block, Decline, Layout, Op, Path
from ..ir.verify import verify_block

__all__ = ["Target", "straight_line"]


class Target:
    """A machine: which ranks suit it, and how it runs a layout. One file each; found by discovery."""

    name: ClassVar[str]
    summary: ClassVar[str]
    rank_multiple: ClassVar[int] = 8
    """Ranks are proposed as multiples of this (small weights excepted)."""

    def rank_step(self, axes: Mapping[str, int]) -> int:
        """Lattice step for a weight: ``rank_multiple``, or 1 where the smaller side is below eight steps."""
        return self.rank_multiple if min(axes.values()) >= 8 * self.rank_multiple else 1

    def lower(self, layout: Layout, paths: tuple[Path, ...]) -> Block | Decline:
        """The block that runs ``layout`` on this machine."""
        return straight_line(layout, paths)


@lru_cache(maxsize=4096)
def straight_line(layout: Layout, paths: tuple[Path, ...]) -> Block:
    """Lower every piece to a chain of matmuls, share what is equal, and join the pieces.

    Pieces that stand side by side along an output axis are concatenated and gathered once. Pieces along an input axis
    each take their entries of the activation, and their results are summed; where two chains end in the same factor,
    the sum moves before it, so that the factor is applied once.
    """
    rebuild, axes = layout.rebuild, layout.axes
    builder = _Builder()
    split_input = bool(rebuild.join) and any(rebuild.parts[0] in p[0].equation.inputs[0].axes for p in paths)
    chains: list[tuple[str, Path]] = []
    start = 0
    for k, path in enumerate(paths):
        value = "x"
        if split_input:
            stop = start + axes[rebuild.parts[k]]
            empty, begin, start = stop == start, start, stop
            if empty:
                continue
            value = builder.emit(Op("take", "", ("x", rebuild.index), None, begin, stop))
        elif rebuild.join and axes[rebuild.parts[k]] == 0:
            continue
        chains.append((value, path))
    if split_input or not rebuild.join:
        output = _sum_chains(builder, chains)
    else:
        ends = tuple(builder.chain(value, path) for value, path in chains)
        whole = ends[0] if len(ends) == 1 else builder.emit(Op("concat", "", ends))
        output = builder.emit(Op("take", "", (whole, rebuild.index), None, 0, axes[rebuild.join]))
    used = {name for op in builder.ops for name in op.inputs}
    factors = tuple((name, shape) for name, shape in layout.shapes.items() if name in used)
    sizes = tuple((axis, size) for axis, size in layout.sizes)
    block = Block(factors, tuple(builder.ops), output, sizes)
    verify_block(block)
    return block


def _sum_chains(builder: _Builder, chains: list[tuple[str, Path]]) -> str:
    """Sum of chains; a last step that all of them share is applied once, after the sum."""
    last = {(path[-1].factor, path[-1].equation.output) for _, path in chains}
    if len(chains) > 1 and len(last) == 1:
        heads = [builder.chain(value, path[:-1]) for value, path in chains]
        total = heads[0]
        for head in heads[1:]:
            total = builder.emit(Op("add", "", (total, head)))
        return builder.chain(total, chains[0][1][-1:])
    total = builder.chain(*chains[0])
    for value, path in chains[1:]:
        total = builder.emit(Op("add", "", (total, builder.chain(value, path))))
    return total


class _Builder:
    """Ops by value numbering: an op that was already emitted gives the value that it gave then."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._known: dict[object, str] = {}

    def emit(self, op: Op) -> str:
        key = (op.kind, op.inputs, op.equation and str(op.equation), op.start, op.stop)
        if key not in self._known:
            self._known[key] = f"t{len(self.ops)}"
            self.ops.append(Op(op.kind, self._known[key], op.inputs, op.equation, op.start, op.stop))
        return self._known[key]

    def chain(self, value: str, path: Path) -> str:
        for step in path:
            value = self.emit(Op("matmul", "", (value, step.factor), step.equation))
        return value
