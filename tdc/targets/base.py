"""What a machine is to the compiler, and the lowering that all of them share."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from ..ir import Block, Decline, Equation, Layout, Op, OpKind, Path, Pivot, Step, Term, Window
from ..ir.machine import Machine, Table
from ..ir.verify import verify_block

__all__ = ["Target", "dense_weight", "straight_line"]


class Target:
    """A machine: which ranks suit it, and how it runs a layout. One file each; found by discovery."""

    name: str
    summary: str
    rank_multiple: int = 8
    """Ranks are proposed as multiples of this (small weights excepted)."""
    min_rank: int = 1
    """No smaller rank is proposed."""
    machine: Machine | None = None
    """What is known of it as data, for predictions of time."""
    table: Table | None = None
    """Times that were measured on it."""
    remark: str = ""
    """Why there is no table although one might be expected."""

    @property
    def orders_by_time(self) -> bool:
        """Whether contraction orders are those of least time, and not of fewest multiply-adds."""
        return False

    def here(self) -> Target:
        """The target with what this machine knows of it."""
        return self

    def rank_step(self, full: int) -> int:
        """Lattice step for ranks up to ``full``: ``rank_multiple`` where that leaves eight steps, half of it where that
        does, else 1.
        """
        return next((step for step in (self.rank_multiple, self.rank_multiple // 2) if full >= 8 * step > 0), 1)

    def lower_weight(
        self, kind: OpKind, layout: Layout, windows: tuple[Window, ...], execution: str
    ) -> Block | Decline:
        """The block that builds the dense weight from the factors of ``layout`` and applies it."""
        return dense_weight(kind, layout, windows, execution)

    def lower(self, kind: OpKind, layout: Layout, paths: tuple[Path, ...]) -> Block | Decline:
        """The block that runs ``layout`` in place of an operator of that kind on this machine."""
        return straight_line(kind, layout, paths)


@lru_cache(maxsize=4096)
def straight_line(kind: OpKind, layout: Layout, paths: tuple[Path, ...]) -> Block | Decline:
    """Lower every piece to a chain of products, share what is equal, and sum the pieces.

    A factor that is stored without its identity block (see :class:`tdc.ir.Pivot`) is one gather: at an input, the
    entries of the identity pass by the product and are added to it; at an output, they stand beside it. Declined: a
    convolution by a factor that all channels share.
    """
    builder = _Builder(kind, layout)
    if kind.is_conv:
        for step in (step for path in paths for step in path):
            if not _is_convolution(kind, step):
                return Decline(f"no convolution applies '{step}' by itself")
    ends = [builder.chain("x", path) for path in paths]
    output = ends[0]
    for end in ends[1:]:
        output = builder.emit(Op("add", "", (output, end)))
    used = {name for op in builder.ops for name in op.inputs}
    factors = tuple((name, shape) for name, shape in layout.shapes.items() if name in used)
    block = Block(factors, tuple(builder.ops), output, layout.sizes, kind=kind)
    verify_block(block)
    return block


@lru_cache(maxsize=4096)
def dense_weight(kind: OpKind, layout: Layout, windows: tuple[Window, ...], execution: str) -> Block | Decline:
    """Build the weight, apply it. Declined: a layout with factors that are stored without their identity block."""
    if layout.rebuild.pivots:
        return Decline("a pivoted factor saves nothing in a weight that is built whole")
    ops = (
        Op("weight", "w", layout.rebuild.names, rebuild=layout.rebuild),
        Op("conv" if kind.is_conv else "matmul", "t0", ("x", "w"), kind.dense, windows=windows),
    )
    block = Block(tuple(layout.shapes.items()), ops, "t0", layout.sizes, kind=kind, execution=execution)
    verify_block(block)
    return block


def _is_convolution(kind: OpKind, step: Step) -> bool:
    """Whether every channel of the activation is a group of the factor or summed over."""
    activation, factor = (set(term.axes) for term in step.equation.inputs)
    channels = activation - {"b", *kind.windows}
    return "g" in factor and not channels - factor and bool(step.equation.inputs[1].groups[0][0] == "g")


class _Builder:
    """Ops by value numbering: an op that was already emitted gives the value that it gave then."""

    def __init__(self, kind: OpKind, layout: Layout) -> None:
        self.kind, self.layout = kind, layout
        self.ops: list[Op] = []
        self._known: dict[Op, str] = {}

    def emit(self, op: Op) -> str:
        if op not in self._known:
            self._known[op] = f"t{len(self.ops)}"
            self.ops.append(replace(op, output=self._known[op]))
        return self._known[op]

    def chain(self, value: str, path: Path) -> str:
        for step in path:
            pivot = self.layout.rebuild.pivots.get(step.factor)
            if pivot is None:
                value = self.product(value, step)
            else:
                value = (
                    self.pivoted_output(value, step, pivot) if pivot.leading else self.pivoted_input(value, step, pivot)
                )
        return value

    def product(self, value: str, step: Step) -> str:
        kind = "conv" if self.kind.is_conv else "matmul"
        terms = (*step.equation.inputs, step.equation.output)
        if kind == "matmul" and any(len(term.axes) > 2 for term in terms):
            return self.contract(value, step)
        return self.emit(Op(kind, "", (value, step.factor), step.equation, windows=step.windows))

    def contract(self, value: str, step: Step) -> str:
        """With the axes of activation and output behind ``b`` in one; of the last output, as many as there are."""
        axes, (activation, factor), output = self.layout.axes, step.equation.inputs, step.equation.output
        flat = [Term((("b",), tuple(axis for axis in term.axes if axis != "b"))) for term in (activation, output)]
        stop = 0
        if output.axes == ("b", *self.layout.rebuild.output.groups[0]):
            stop = axes["o"] if math.prod(axes[axis] for axis in flat[1].groups[1]) > axes["o"] else 0
        equation = Equation((flat[0], factor), flat[1])
        return self.emit(Op("contract", "", (value, step.factor), equation, stop=stop))

    def pivoted_input(self, value: str, step: Step, pivot: Pivot) -> str:
        whole, kept = self._entries(pivot)
        value_kept = self.emit(Op("take", "", (value, pivot.index), None, 0, kept))
        if kept == whole:
            return value_kept
        rest = self.emit(Op("take", "", (value, pivot.index), None, kept, whole))
        return self.emit(Op("add", "", (value_kept, self.product(rest, step))))

    def pivoted_output(self, value: str, step: Step, pivot: Pivot) -> str:
        whole, kept = self._entries(pivot)
        if kept < whole:
            value = self.emit(Op("concat", "", (value, self.product(value, step))))
        return self.emit(Op("take", "", (value, pivot.index), None, 0, whole))

    def _entries(self, pivot: Pivot) -> tuple[int, int]:
        """Entries of the split axis and of its identity block, all groups together."""
        axes, (whole,) = self.layout.axes, self.layout.shapes[pivot.index]
        return whole, whole // axes[pivot.split] * axes[pivot.rank] if whole else 0
