"""Two threads of the kernels in C where the other core is free, and where something else has it.

    python benchmarks/bench_threads.py [--laps 60]

``situation``: ``free``, or ``one core taken`` by a process that is bound to it and never sleeps, or ``both``. Layers
with a gather before the products, float32, cold weights: each contestant goes through a pool larger than the last-level
cache, one thread and two in turn. ``stock``: the same factors on stock operators, apart from the kernel, since their
threads spin for a while when the work is done. Times in microseconds. ``two to one``: times as fast as on one thread,
by least, median and mean time. Rows go to results/threads.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from bench_kernels import pool
from common import read_rows, write_rows

from tdc.kernels.c import two_products

NAME = "threads"
KEYS = ("outputs", "inputs", "rank", "rows", "situation")
SHAPES = ((1024, 1024, 320), (1024, 1024, 512), (4096, 4096, 1024))
SITUATIONS = {"free": (), "one core taken": (1,), "both cores taken": (0, 1)}
RUNS = {"kernel": two_products.run, "stock": two_products.reference}
KINDS = {"least": min, "median": statistics.median, "mean": statistics.fmean}
_BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextmanager
def taken(cores: tuple[int, ...]) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", _BUSY, str(core)]) for core in cores]
    try:
        time.sleep(0.3)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured(shape: tuple[int, int, int], rows: int, laps: int) -> dict[str, object]:
    outputs, inputs, rank = shape
    operands, x = pool("gather before", outputs, inputs, rank), torch.randn(rows, inputs)
    row: dict[str, object] = {}
    for who, run in RUNS.items():
        times: dict[int, list[float]] = {1: [], 2: []}
        with torch.inference_mode():
            for lap in range(laps + 3):
                for place, (threads, found) in enumerate(times.items()):
                    torch.set_num_threads(threads)
                    given = operands[(lap + place * len(operands) // 2) % len(operands)]
                    start = time.perf_counter()
                    run(x, *given)
                    found.append((time.perf_counter() - start) * 1e6)
        one, two = (found[3:] for found in times.values())
        for kind, of in KINDS.items():
            row |= {f"{who} 1 {kind} us": f"{of(one):.0f}", f"{who} 2 {kind} us": f"{of(two):.0f}"}
            row[f"{who}, two to one, {kind}"] = f"{of(one) / of(two):.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=60)
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) < 2 or not two_products.versions():
        raise SystemExit("skipped: needs two cores and a C compiler")
    kept = {tuple(row[key] for key in KEYS): row for row in read_rows(NAME)}
    for situation, cores in SITUATIONS.items():
        with taken(cores):
            for shape in SHAPES:
                for rows in (1, 16):
                    row = dict(zip(KEYS, (*shape, rows, situation), strict=True)) | measured(shape, rows, chosen.laps)
                    kept[tuple(str(row[key]) for key in KEYS)] = {key: str(value) for key, value in row.items()}
                    print(
                        *(f"{key} {row[key]}" for key in (*KEYS, *(key for key in row if "two to one" in key))),
                        sep=", ",
                        flush=True,
                    )
    write_rows(NAME, list(kept.values()))


if __name__ == "__main__":
    main()
