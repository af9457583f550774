"""Machines as data: what a target's description says, and times that were measured on one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["SOURCES", "Compute", "Figure", "Machine", "Memory", "Table", "Timing", "Work"]

SOURCES = ("measured", "datasheet", "literature", "assumed", "derived")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number above 0 with its unit, and where it comes from: one of SOURCES."""

    value: float
    unit: str
    source: str
    ref: str = ""

    def __str__(self) -> str:
        unit = "" if self.unit == "1" else f" {self.unit}"
        return f"{self.value:.4g}{unit} ({self.source}{': ' * bool(self.ref)}{self.ref})"


@dataclass(frozen=True, slots=True)
class Compute:
    """``peak`` operations a second in one dtype (a multiply-add is two), of which products of matrices reach the part
    ``efficiency``; they are padded to multiples of ``tile`` = (m, n, k) rows, outputs and inputs.
    """

    dtype: str
    peak: Figure
    efficiency: Figure
    tile: tuple[Figure, Figure, Figure]

    @property
    def rate(self) -> float:
        return self.peak.value * self.efficiency.value


@dataclass(frozen=True, slots=True)
class Memory:
    """One level: what it holds, and how many bytes a second come from it."""

    name: str
    bytes: Figure
    bandwidth: Figure


@dataclass(frozen=True)
class Machine:
    """What the compiler knows of a machine.

    ``memory``: innermost level first, the last one holds the weights. ``launch``: seconds that every operation takes
    beside its work. ``overlap``: the part of the lesser of computing and moving that the greater one hides.
    ``operators``: names of the ONNX operators that it runs. ``digest``: of the description's file.
    """

    id: str
    kind: str
    summary: str
    rank_multiple: Figure
    min_rank: Figure
    compute: tuple[Compute, ...]
    memory: tuple[Memory, ...]
    launch: Figure
    overlap: Figure
    operators: tuple[str, ...]
    digest: str = ""

    @property
    def name(self) -> str:
        """As plans record it: the id and the beginning of the digest."""
        return f"{self.id}@{self.digest[:12]}" if self.digest else self.id

    def computes(self, dtype: str) -> Compute:
        """The figures of a dtype; where the description has none, those of its slowest one."""
        known = {c.dtype: c for c in self.compute}
        return known.get(dtype) or min(self.compute, key=lambda c: c.rate)

    def bandwidth(self, size: float) -> float:
        """Bytes a second of the innermost level that holds ``size`` bytes, or of the last one."""
        return next((m for m in self.memory if m.bytes.value >= size), self.memory[-1]).bandwidth.value


@dataclass(frozen=True, slots=True)
class Work:
    """One operation at its sizes. ``kind`` says which, and what the sizes are:

    =====================  ===========================================================================================
    ``gemm``               rows, inputs, outputs; the weight is not in the caches
    ``bmm``                batch, rows, inputs, outputs
    ``conv 3x3``           examples, positions of an example, inputs, outputs; ``conv 3x3/2``: with a stride, or notes
    ``depthwise 3x3``      examples, positions, channels
    ``grouped 3x3``        examples, positions, inputs and outputs of a group, groups
    ``take``               rows, entries: a gather of the last axis
    ``take planes``        examples, positions, channels: a gather of axis 1
    ``concat``, ``add``    rows, entries of the result
    ``copy``               bytes read and written
    ``rebuild``            multiply-adds, numbers read and written
    ``two products``       rows, inputs, rank, outputs, by TDC's own kernel
    ``one product``        rows, inputs, outputs, by TDC's own kernel
    ``launch``             (none) the least that an operation takes
    =====================  ===========================================================================================

    ``read``: entries of the input for each position of the output, of a convolution.
    """

    kind: str
    sizes: tuple[float, ...]
    dtype: str = "float32"
    read: float = field(default=1.0, compare=False)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one operation, over several calls."""

    least: float
    median: float


@dataclass(frozen=True, eq=False)
class Table:
    """Times that were measured on one machine. ``fingerprint``: what they depend on. ``drift``: by what part a fixed
    product took another time at the end than at the start. ``left_out``: points for which there was no time.
    """

    fingerprint: Mapping[str, str]
    timings: Mapping[Work, Timing]
    date: str = ""
    drift: float = 0.0
    noisy: bool = False
    left_out: int = 0

    @property
    def key(self) -> str:
        """A digest of the fingerprint: the name of the table's file."""
        text = "\0".join(f"{key}={value}" for key, value in sorted(self.fingerprint.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def grids(self) -> Mapping[tuple[str, str], Mapping[tuple[float, ...], float]]:
        """(kind, dtype) -> sizes -> the least seconds."""
        found: dict[tuple[str, str], dict[tuple[float, ...], float]] = {}
        for work, timing in self.timings.items():
            found.setdefault((work.kind, work.dtype), {})[work.sizes] = timing.least
        return found
