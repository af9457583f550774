"""What ``tdc target`` prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from . import targets
from .ir.machine import Machine, Table
from .ir.text import format_count, format_table
from .planning.seconds import fitted
from .targets import Target
from .targets._table import path_of

__all__ = ["listed", "measured", "shown"]

_RUNS = (1.0, 4.0, 16.0)


def listed() -> str:
    """All targets, and whether there is a table of this machine."""
    rows = [("auto", "python", "the processor: cpu")]
    rows += [(name, "python", targets.get(name).summary) for name in targets.names()]
    rows += [(name, "description", targets.get(name).summary) for name in targets.described()]
    return "\n".join([format_table(("name", "kind", "what"), rows, left=3), "", _table_line(targets.get("cpu"))])


def _table_line(target: Target) -> str:
    if target.table is not None:
        return f"times of this machine: {path_of(target.table)}, of {target.table.date}"
    return f"no times of this machine{': ' * bool(target.remark)}{target.remark}; 'tdc target measure' takes them"


def shown(name: str) -> str:
    """The description of a target and, where there is one, its table."""
    target = targets.get(name)
    lines = [f"{target.name}: {target.summary}"]
    if target.machine is not None:
        lines += ["", _description(target.machine)]
    if target.table is not None:
        lines += ["", measured(target.table, target.machine)]
    elif target.name in targets.names():
        lines += ["", _table_line(target)]
    return "\n".join(lines)


def _description(machine: Machine) -> str:
    rows = [("ranks", "multiple", str(machine.rank_multiple)), ("", "least", str(machine.min_rank))]
    for own in machine.compute:
        rows += [(own.dtype, "peak", str(own.peak)), ("", "efficiency", str(own.efficiency))]
        rows += [("", f"tile {side}", str(step)) for side, step in zip("mnk", own.tile, strict=True)]
    for level in machine.memory:
        rows += [(level.name, "bytes", str(level.bytes)), ("", "bandwidth", str(level.bandwidth))]
    rows += [("operation", "launch", str(machine.launch)), ("", "overlap", str(machine.overlap))]
    head = f"description {machine.id}, kind {machine.kind}, digest {machine.digest[:12]}"
    return "\n".join([head, format_table(("", "", "figure"), rows, left=3), f"operators {' '.join(machine.operators)}"])


def measured(table: Table, machine: Machine | None) -> str:
    """The summary of a table: where and when it was measured, and what follows from it."""
    state = f"noisy: a fixed product took {1 + table.drift:.2f} times as long at the end" if table.noisy else "quiet"
    lines = [
        f"times measured on {table.date} ({state}, drift {table.drift:+.1%}), table {table.key}",
        *(f"  {key}: {value}" for key, value in table.fingerprint.items()),
        f"  {len(table.timings)} operations{f', {table.left_out} left out for want of time' * bool(table.left_out)}",
    ]
    rows = []
    for (kind, dtype), times in sorted(table.grids.items()):
        ranges = " x ".join(f"{min(line):g}..{max(line):g}" for line in zip(*times, strict=True)) or "-"
        rows.append((kind, dtype, str(len(times)), ranges, f"{1e6 * min(times.values()):.3g}"))
    lines.append(format_table(("operation", "dtype", "points", "sizes", "least us"), rows, left=2))
    if machine is not None:
        own = fitted(machine, table)
        lines += [f"{c.dtype} {format_count(c.peak.value)}op/s ({c.peak.source})" for c in own.compute]
        lines += [f"{m.name} {format_count(m.bandwidth.value)}B/s ({m.bandwidth.source})" for m in own.memory]
        lines.append(f"launch {1e6 * own.launch.value:.3g} us ({own.launch.source})")
    return "\n".join([*lines, *_kernels(table.grids)])


def _kernels(grids: Mapping[tuple[str, str], Mapping[tuple[float, ...], float]]) -> list[str]:
    """TDC's own kernel of one product against the stock one, at the sizes that both have."""
    own, stock = grids.get(("one product", "float32"), {}), grids.get(("gemm", "float32"), {})
    lines = []
    for rows in _RUNS:
        gains = [stock[sizes] / own[sizes] for sizes in own if sizes[0] == rows and sizes in stock]
        if gains:
            middle = statistics.median(gains)
            where = "1 row" if rows == 1 else f"{rows:g} rows"
            lines.append(f"TDC's kernel at {where}: {middle:.2f} times as fast as stock ({len(gains)} shapes, median)")
    return lines
