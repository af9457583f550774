"""Targets that a file describes."""

from __future__ import annotations

from ..ir import Block, Decline, Layout, OpKind, Path, Window
from ..ir.machine import Machine
from .base import Target

__all__ = ["Described"]

_OPERATORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "matmul": (("MatMul", "Gemm"),),
    "contract": (("Reshape",), ("Transpose",), ("MatMul",)),
    "conv": (("Conv",),),
    "take": (("Gather",),),
    "concat": (("Concat",),),
    "add": (("Add",),),
    "weight": (),
}
"""What each primitive is in ONNX: of each row one operator must be there."""


class Described(Target):
    """Ranks, times and operators are those of the description; its blocks are those of every target. A block that needs
    an operator that the machine lacks is declined.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine: Machine = machine
        self.name, self.summary = machine.name, machine.summary
        self.rank_multiple, self.min_rank = int(machine.rank_multiple.value), int(machine.min_rank.value)

    @property
    def orders_by_time(self) -> bool:
        return True

    def rank_step(self, full: int) -> int:
        """``rank_multiple``, halved until it leaves eight steps up to ``full``."""
        step = self.rank_multiple
        while step > 1 and full < 8 * step:
            step //= 2
        return step

    def lower_weight(
        self, kind: OpKind, layout: Layout, windows: tuple[Window, ...], execution: str
    ) -> Block | Decline:
        return self._able(super().lower_weight(kind, layout, windows, execution))

    def lower(self, kind: OpKind, layout: Layout, paths: tuple[Path, ...]) -> Block | Decline:
        return self._able(super().lower(kind, layout, paths))

    def _able(self, block: Block | Decline) -> Block | Decline:
        if isinstance(block, Decline):
            return block
        for op in block.ops:
            for names in _OPERATORS[op.kind]:
                if not set(names) & set(self.machine.operators):
                    return Decline(f"{self.machine.id} has no {' or '.join(names)}")
        return block


class Recorded(Target):
    """A described target of which only the name is left, in a plan: its blocks are those of every target."""

    def __init__(self, name: str) -> None:
        self.name, self.summary = name, "known by its name alone"
