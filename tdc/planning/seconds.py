"""How long operations take: as measured, between what was measured, or by a model of the machine.

The model (Williams, Waterman, Patterson 2009; the overlap as in XLA's gpu_performance_model)::

    c = 2 b m^ n^ k^ / (peak efficiency)        sizes rounded up to multiples of the tile
    w = weights / B_last + activations / B_l    l: the innermost level that holds them
    t = c + w - overlap min(c, w) + launch

With a table, peak, bandwidths and launch are those that it has, and t is multiplied by what the measured times are of
the modelled ones: between the points of a grid by linear interpolation of the logarithm over the logarithms of the
sizes (``interpolated``), outside, and where points are lacking, by the nearest ones (``modelled``).
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..ir import Block
from ..ir.machine import Figure, Machine, Table, Work
from .cost import ITEMSIZE
from .works import Call, works_of

__all__ = ["LABELS", "Clock", "Estimate", "amount", "fitted"]

LABELS = ("measured", "interpolated", "modelled")
"""From the most to the least trustworthy."""
_REACH = 3
"""Lines to each side of a point that may bound its cell: the nearest first, further ones where corners are lacking."""
_Point = tuple[float, ...]
_Side = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Estimate:
    """Seconds, and where they come from, of several the least trustworthy one."""

    seconds: float
    label: str = LABELS[0]

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, max(self.label, other.label, key=LABELS.index))

    def times(self, count: float) -> Estimate:
        return replace(self, seconds=self.seconds * count)


@dataclass(frozen=True)
class Amount:
    """The product (batch, m, n, k) of an operation, () for none, and the numbers of weights and activations moved."""

    product: tuple[float, ...]
    weights: float
    activations: float


def amount(work: Work) -> Amount:
    """What an operation computes and moves."""
    kind, sizes = work.kind.split()[0], work.sizes
    if work.kind in ("two products", "one product"):
        rows, *widths = sizes
        weights = sum(a * b for a, b in itertools.pairwise(widths))
        return Amount((1, rows, 1, weights), weights, rows * (widths[0] + widths[-1]))
    if kind == "gemm":
        rows, inputs, outputs = sizes
        return Amount((1, rows, outputs, inputs), inputs * outputs, rows * (inputs + outputs))
    if kind == "bmm":
        batch, rows, inputs, outputs = sizes
        return Amount((batch, rows, outputs, inputs), batch * inputs * outputs, batch * rows * (inputs + outputs))
    if kind in ("conv", "grouped", "depthwise"):
        taps = math.prod(map(int, re.findall(r"\d+", work.kind.partition("/")[0])))
        examples, plane, *channels = sizes
        inputs, outputs, groups = (*channels, 1.0)[:3] if kind != "depthwise" else (1.0, 1.0, channels[0])
        moved = examples * plane * groups * (inputs * work.read + outputs)
        return Amount((groups, examples * plane, outputs, inputs * taps), groups * inputs * outputs * taps, moved)
    if kind == "rebuild":
        return Amount((1, sizes[0], 1, 1), 0, sizes[1])
    if kind == "copy":
        return Amount((), 0, sizes[0] / ITEMSIZE.get(work.dtype, 4))
    return Amount((), 0, math.prod(sizes) * (3 if kind == "add" else 2) if sizes else 0)


def roofline(machine: Machine, work: Work) -> float:
    """Seconds by the model alone."""
    own, size, compute = amount(work), ITEMSIZE.get(work.dtype, 4), machine.computes(work.dtype)
    computing = 0.0
    if own.product:
        batch, *sides = own.product
        tile = (1, 1, 1) if work.kind.startswith(("depthwise", "rebuild", "one", "two")) else compute.tile
        steps = [step if isinstance(step, int) else step.value for step in tile]
        padded = (math.ceil(side / step) * step for side, step in zip(sides, steps, strict=True))
        computing = 2 * batch * math.prod(padded) / compute.rate
    weights, moved = own.weights * size, own.activations * size
    moving = weights / machine.memory[-1].bandwidth.value + moved / machine.bandwidth(moved)
    hidden = machine.overlap.value * min(computing, moving)
    return computing + moving - hidden + machine.launch.value


def fitted(machine: Machine, table: Table) -> Machine:
    """The machine with the peaks, bandwidths and launch that a table has."""

    def measured(value: float, unit: str) -> Figure:
        return Figure(value, unit, "measured", table.date)

    compute = []
    for own in machine.compute:
        times = table.grids.get(("gemm", own.dtype), {})
        rate = max((2 * math.prod(sizes) / seconds for sizes, seconds in times.items()), default=0.0)
        one = measured(1.0, "1")
        compute.append(replace(own, peak=measured(rate, "op/s"), efficiency=one) if rate else own)
    copies = {sizes[0]: sizes[0] / seconds for sizes, seconds in table.grids.get(("copy", "float32"), {}).items()}
    memory, inner, speed = [], 0.0, math.inf
    for level in machine.memory:
        found = [rate for size, rate in copies.items() if inner < size <= level.bytes.value]
        speed = min(speed, max(found, default=level.bandwidth.value))
        memory.append(replace(level, bandwidth=measured(speed, "B/s") if found else _at_most(level.bandwidth, speed)))
        inner = level.bytes.value
    launch = table.grids.get(("launch", "float32"), {}).get(())
    return replace(
        machine,
        compute=tuple(compute),
        memory=tuple(memory),
        launch=measured(launch, "s") if launch else machine.launch,
    )


def _at_most(figure: Figure, most: float) -> Figure:
    """The figure, or ``most`` where that is less."""
    return figure if figure.value <= most else replace(figure, value=most, source="derived")


@dataclass(frozen=True, eq=False)
class Clock:
    """Tells what operations and blocks take on a machine, with a table of it or without."""

    machine: Machine
    table: Table | None = None
    _known: dict[tuple[Work, float], Estimate] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> Machine:
        return self.machine if self.table is None else fitted(self.machine, self.table)

    @cached_property
    def grids(self) -> Mapping[tuple[str, str], _Grid]:
        """For each kind of operation: the logarithms of measured over modelled times."""
        if self.table is None:
            return {}
        return {
            key: _Grid.of({s: math.log(t / roofline(self.model, Work(key[0], s, key[1]))) for s, t in times.items()})
            for key, times in self.table.grids.items()
        }

    def work(self, work: Work) -> Estimate:
        """Seconds of one operation."""
        key = (work, work.read)
        if key not in self._known:
            self._known[key] = self._estimate(work)
        return self._known[key]

    def _estimate(self, work: Work) -> Estimate:
        grid, sizes, own = self._grid(work)
        plain = roofline(self.model, replace(work, read=1.0) if own else work)  # as the grid was made
        if grid is None:
            return Estimate(plain, "modelled")
        if own and self.table is not None and sizes in (times := self.table.grids[work.kind, work.dtype]):
            return Estimate(times[sizes], "measured")
        value, inside = grid.at(sizes)
        return Estimate(plain * math.exp(value), "interpolated" if inside and own else "modelled")

    def _grid(self, work: Work) -> tuple[_Grid | None, _Point, bool]:
        """The grid that serves an operation, the place in it, and whether it is of the same kind."""
        for k, (kind, sizes) in enumerate(_likes(work)):
            for dtype in (work.dtype, "float32"):
                if (kind, dtype) in self.grids:
                    return self.grids[kind, dtype], sizes, k == 0 and dtype == work.dtype
        return None, work.sizes, False

    def block(self, block: Block, call: Call, without: Collection[str] = ()) -> Estimate:
        """Seconds of one call of a block; operations that give the values ``without`` are left out."""
        works = (work for _, own in works_of(block, call, without) for work in own)
        return sum(map(self.work, works), Estimate(0.0))


def _likes(work: Work) -> list[tuple[str, _Point]]:
    """The kind of an operation with its sizes, and kinds that are as far from the model as it is, about."""
    kind, _, window = work.kind.partition(" ")
    found = [(work.kind, work.sizes)]
    if kind in ("conv", "depthwise", "grouped"):
        taps = [int(size) for size in window.partition("/")[0].split("x")]
        near = "x".join("1" if size == 1 else "3" for size in taps[-2:])
        sizes = work.sizes[:4]
        kind = "depthwise" if kind == "depthwise" else "conv"
        found += [(f"{kind} {window.partition('/')[0]}", sizes), (f"{kind} {near}", sizes)]
    elif kind == "bmm":
        found.append(("gemm", work.sizes[1:]))
    return found


@dataclass(frozen=True)
class _Grid:
    """Values at points of a grid, which may lack some; ``lines``: the logarithms of the sizes along each axis."""

    values: Mapping[_Point, float]
    lines: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, points: Mapping[_Point, float]) -> _Grid:
        values = {tuple(math.log(size) for size in sizes): value for sizes, value in points.items()}
        return cls(values, tuple(tuple(sorted(set(line))) for line in zip(*values, strict=True)))

    def at(self, sizes: _Point) -> tuple[float, bool]:
        """The value there, and whether the point is within a cell of the grid."""
        point = tuple(math.log(max(size, 1e-9)) for size in sizes)
        near = tuple(min(max(x, line[0]), line[-1]) for x, line in zip(point, self.lines, strict=True))
        inside = all(abs(a - b) < 1e-9 for a, b in zip(point, near, strict=True))
        options = [_sides(x, line) for x, line in zip(near, self.lines, strict=True)]
        cells = sorted(itertools.product(*options), key=lambda cell: sum(side[-1][0] - side[0][0] for side in cell))
        for cell in cells:
            found = self._cell(cell)
            if found is not None:
                return found, inside
        corners = itertools.product(*cells[0])
        return sum(math.prod(share for _, share in c) * self._near(tuple(x for x, _ in c)) for c in corners), False

    def _near(self, point: _Point) -> float:
        """The value there, or at the nearest point."""
        if point in self.values:
            return self.values[point]
        nearest = min(self.values, key=lambda other: sum((a - b) ** 2 for a, b in zip(other, point, strict=True)))
        return self.values[nearest]

    def _cell(self, sides: Sequence[_Side]) -> float | None:
        """By the corners of a cell, None if one of them is lacking."""
        total = 0.0
        for corner in itertools.product(*sides):
            place = tuple(x for x, _ in corner)
            if place not in self.values:
                return None
            total += math.prod(share for _, share in corner) * self.values[place]
        return total


def _sides(x: float, line: Sequence[float]) -> list[_Side]:
    """Pairs of lines around ``x`` with their shares, or the one on which it lies."""
    k = bisect_left(line, x - 1e-9)
    exact = [((line[k], 1.0),)] if abs(line[k] - x) < 1e-9 else []
    lower, upper = line[max(0, k - _REACH) : k], line[k + len(exact) : k + len(exact) + _REACH]
    pairs = [((a, (b - x) / (b - a)), (b, (x - a) / (b - a))) for a in lower for b in upper]
    return [*exact, *pairs]
