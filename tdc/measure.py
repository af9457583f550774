"""Timing that can be trusted on a shared machine: in turn, on one pinned core, with one thread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Timing", "interleaved", "one_thread"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over all repeats."""

    minimum: float
    median: float


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread on one pinned core inside (where the system can pin); as it was before after it."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def interleaved(
    contestants: Mapping[str, Callable[[], object]], *, repeats: int = 25, warmup: int = 3
) -> dict[str, Timing]:
    """Run all contestants in turn, ``repeats`` times after ``warmup`` rounds; seconds by name.

    Compare minima or medians as ratios: absolute times drift with the load of the machine.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    with one_thread(), torch.no_grad():
        for lap in range(warmup + repeats):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if lap >= warmup:
                    taken[name].append(seconds)
    return {name: Timing(min(seconds), statistics.median(seconds)) for name, seconds in taken.items()}
