"""What the Triton kernels need of the machine: whether it has them, its size, and counters that are zero."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from tdc.ir import Decline

__all__ = ["Chip", "available", "chip", "counters", "interpreted", "runs_here"]

OLDEST = (8, 0)
"""Compute capability from which the kernels are used: bfloat16 and asynchronous copies."""
DEPENDENT = (9, 0)
"""Compute capability from which a launch may begin while the one before it ends."""
COUNTERS = 1 << 20
"""Counters in one piece of memory: 4 MB."""

_by_stream: dict[tuple[int, int], Tensor] = {}
_captured: dict[int, tuple[list[Tensor], int]] = {}
"""Of each device: the pieces for captured calls, which stay for good, and how many of the last one are used."""


@dataclass(frozen=True)
class Chip:
    """Multiprocessors, and whether dependent launches overlap."""

    processors: int
    overlaps: bool


@functools.cache
def available() -> Decline | None:
    """Why Triton kernels cannot run on this machine, None where they can."""
    if importlib.util.find_spec("triton") is None:
        return Decline("triton is not installed")
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return Decline("no CUDA device")
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return Decline(f"compute capability {found[0]}.{found[1]}, less than {OLDEST[0]}.{OLDEST[1]}")
    return None


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the processor (TRITON_INTERPRET=1 at its import)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def chip(device: torch.device) -> Chip:
    """The device's figures; of the interpreter, one processor."""
    if device.type != "cuda":
        return Chip(1, False)
    found = torch.cuda.get_device_properties(device)
    return Chip(found.multi_processor_count, (found.major, found.minor) >= DEPENDENT)


def runs_here(*operands: Tensor | None) -> bool:
    """Whether all lie on one CUDA device, or on the processor and Triton interprets."""
    places = {t.device for t in operands if t is not None}
    kind = next(iter(places)).type
    return len(places) == 1 and (kind == "cuda" or (kind == "cpu" and available_interpreter()))


def available_interpreter() -> bool:
    return importlib.util.find_spec("triton") is not None and interpreted()


def counters(device: torch.device, number: int) -> Tensor:
    """``number`` int32 zeros that nothing else uses at the same time; who uses them leaves zeros behind.

    Calls on one stream follow each other and share theirs. A call that is captured into a CUDA graph has its own for
    good, since graphs run beside each other: from a piece that an earlier call outside of a capture has left, or else
    zeroed in the graph.
    """
    if device.type != "cuda" or number > COUNTERS:
        return _zeros(device, number)
    place = device.index if device.index is not None else torch.cuda.current_device()
    pieces, used = _captured.get(place, ([], COUNTERS))
    if torch.cuda.is_current_stream_capturing():
        if used + number > COUNTERS:
            return _zeros(device, number)
        _captured[place] = (pieces, used + number)
        return pieces[-1][used : used + number]
    key = (place, torch.cuda.current_stream(device).cuda_stream)
    fresh = key not in _by_stream or used > COUNTERS // 2
    if key not in _by_stream:
        _by_stream[key] = _zeros(device, COUNTERS)
    if used > COUNTERS // 2:
        _captured[place] = ([*pieces, _zeros(device, COUNTERS)], 0)
    if fresh:
        torch.cuda.synchronize(device)
    return _by_stream[key][:number]


def _zeros(device: torch.device, number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.int32, device=device)
