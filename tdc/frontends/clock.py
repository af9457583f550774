"""Timing layers, and what could take their place, in turn on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..ir import Block, Site

__all__ = ["Run", "alike", "copies_of", "in_turn", "once", "part_of_run", "seconds_of", "stand_ins", "stored_numbers"]

_COLD = 64 << 20
"""Bytes of weights that caches do not hold from call to call."""
_MOST_COPIES = 12
_BUDGET = 0.1
"""Seconds spent on a contestant."""
_LAPS = (15, 60)
_RUNS = 9
_FEW, _SHORT = 4, 1e-3
"""Copies of a contestant at most, and seconds of a call, for all of them to run before each that counts."""

Run = Callable[[], object]


def once(run: Run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Sequence[Run]) -> Run:
    """All of them, one after the other."""

    def run() -> None:
        for one in runs:
            one()

    return run


def alike(sites: Iterable[Site], key: Callable[[Site], object]) -> list[tuple[Site, int]]:
    """One of each kind, with how many there are."""
    found: dict[object, list[Site]] = {}
    for site in sites:
        found.setdefault(key(site), []).append(site)
    return [(own[0], len(own)) for own in found.values()]


def copies_of(size: int, model: int) -> int:
    """How many copies of a layer whose weights take ``size`` bytes are timed in turn, in a ``model`` of so many bytes:
    as many as it takes for the caches to hold no more of them than there.
    """
    return max(1, min(_MOST_COPIES, math.ceil(min(_COLD, model) / max(size, 1))))


def seconds_of(contestants: Sequence[Sequence[Run]]) -> list[float]:
    """Seconds of the fastest call of each contestant, called in turn; each has copies, one after the other. Of several
    short ones with few copies all these run before each call that counts: else what others read would take their
    place in the caches.
    """
    taken: list[list[float]] = [[] for _ in contestants]
    with torch.inference_mode():
        for copies in contestants:
            for run in copies[:2]:
                run()
        first = [once(copies[-1]) for copies in contestants]
        laps = min(max(math.ceil(_BUDGET / max(statistics.median(first), 1e-7)), _LAPS[0]), _LAPS[1])
        few = _FEW if len(contestants) > 2 and statistics.median(first) < _SHORT else 0
        for lap in range(laps):
            for own, copies in zip(taken, contestants, strict=True):
                in_order = [copies[(lap + k) % len(copies)] for k in range(len(copies))]
                for run in in_order if len(copies) <= few else ():
                    run()
                own.append(once(in_order[0]))
    return [min(own) for own in taken]


def part_of_run(whole: Run, inside: Sequence[tuple[Run, int]], lost: Run | None = None) -> tuple[float, float]:
    """Seconds of the fastest call of ``whole``, and what part of a call the runs ``inside`` take, each so many times:
    both are timed in the same laps, so that other work on the machine changes the part little.

    ``lost``: what a call costs by itself.
    """
    taken, parts = list[float](), list[float]()
    with torch.inference_mode():
        for lap in range(_RUNS + 1):
            seconds = once(whole)
            empty = 0.0 if lost is None else min(once(lost) for _ in range(3))
            own = sum(count * max(once(run) - empty, 0.0) for run, count in inside)
            if lap:
                taken.append(seconds)
                parts.append(min(own / max(seconds - empty, 1e-9), 1.0))
    return min(taken), statistics.median(parts)


def stand_ins(block: Block, dtype: torch.dtype, device: torch.device, seed: int) -> Mapping[str, Tensor]:
    """Random factors for a block: numbers for what is multiplied, an order for what is gathered by."""
    generator = torch.Generator().manual_seed(seed)
    read = {op.inputs[1] for op in block.ops if op.kind == "take"}
    made = {
        name: torch.randperm(shape[0], generator=generator).int()
        if name in read
        else torch.randn(shape, generator=generator)
        for name, shape in block.factors
    }
    return {name: factor.to(device, factor.dtype if name in read else dtype) for name, factor in made.items()}


def stored_numbers(block: Block) -> int:
    """Entries of all factors."""
    return sum(math.prod(shape) for _, shape in block.factors)
