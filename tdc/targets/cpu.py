"""Processors: stock matrix products."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..ir.machine import Table
from ._description import read
from ._table import check, found, load
from .base import Target

__all__ = ["CPU", "with_table"]


class CPU(Target):
    """Any processor with a BLAS. Ranks in multiples of 8, one AVX register of float32. With a table of times, if there
    is one of this machine.
    """

    name = "cpu"
    summary = "stock matrix products; ranks in multiples of 8"
    rank_multiple = 8

    def __init__(self, table: Table | None = None, remark: str = "") -> None:
        self.machine = read(Path(__file__).with_name("generic-cpu.toml"))
        self.table, self.remark = table, remark

    @property
    def orders_by_time(self) -> bool:
        return self.table is not None

    def here(self) -> Target:
        known = found()
        return _with(known, "") if known is None or isinstance(known, Table) else _with(None, known.reason)


def with_table(path: str) -> CPU:
    """The processor with the table of times in a file. Raises TargetError; so for a table of another machine."""
    table = load(path)
    check(table, path)
    return _with(table, "")


@lru_cache(maxsize=16)
def _with(table: Table | None, remark: str) -> CPU:
    return CPU(table, remark)
