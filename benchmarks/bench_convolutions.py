"""The C kernel for convolutions against dense layers and against the same factors on stock operators.

    python benchmarks/bench_convolutions.py [--laps 20] [--batches 1 16] [--threads 1] [--keep 0.25] [--returned]

3 x 3 convolutions of ResNet-18 and VGG, float32, contiguous, with bias; the forms that ``accelerate`` knows, at that
part of the dense parameters, for ``tucker2`` of the channels. Weights are cold: each contestant goes through a pool
larger than the last-level cache, all in turn in one run. What is freed stays with the process: else the memory that
one contestant returns to the system is zeroed again, page by page, in the next one's time, which is up to half of it;
``--returned`` leaves that to the C library. ``keep``: multiply-adds, of dense. Times in microseconds,
least and median, and ratios of both, beyond one where the kernel is faster. ``realised``: the speed-up of the better
one of kernel and stock operators, as a part of the smaller one of the reductions of multiply-adds and of bytes; the
last line has its distribution over the cases whose dense layer takes 200 us or more. Rows go to
results/convolutions.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor
from torch.nn import functional

from tdc import decompositions, targets
from tdc.ir import Block, Layout, OpKind, Window
from tdc.kernels import Match, match
from tdc.planning.path import contraction_paths

NAME = "convolutions"
KEYS = ("inputs", "outputs", "size", "stride", "form", "part", "batch", "threads", "memory")
POOL = 64 << 20
SHAPES = (
    (64, 64, 56, 1),
    (64, 128, 56, 2),
    (128, 128, 28, 1),
    (128, 256, 28, 2),
    (256, 256, 14, 1),
    (256, 512, 14, 2),
    (512, 512, 7, 1),
    (128, 128, 56, 1),
    (256, 256, 28, 1),
    (512, 512, 14, 1),
)
FORMS = ("tucker2", "output_svd", "input_svd", "spatial_svd", "tt_conv")
LEAST = 200.0


def keep_memory() -> str:
    """Tell the C library to return no memory to the system; "kept", or "returned" where it is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return "returned"
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    for name, value in ((trim_threshold, 2**31 - 1), (top_pad, 1 << 28), (mmap_max, 0)):
        ctypes.CDLL(None).mallopt(name, value)
    return "kept"


def windows(stride: int) -> tuple[Window, ...]:
    return Window("p", 3, stride, 1, 1, 1), Window("q", 3, stride, 1, 1, 1)


def replaced(form: str, inputs: int, outputs: int, stride: int, part: float) -> tuple[Layout, Block]:
    """The layout and the block of that form."""
    axes = {"g": 1, "o": outputs, "i": inputs, "p": 3, "q": 3}
    found = decompositions.get(form)
    if form == "tucker2":
        ranks = {"r": round(inputs * part), "s": round(outputs * part)}
    else:
        sizes = ((sum(t.numel() for t in meta(found.layout(axes, r, ""))), r) for r in found.rank_lattice(axes, 8, ""))
        ranks = max((size, tuple(r.items())) for size, r in sizes if size <= part * 9 * inputs * outputs)[1]
        ranks = dict(ranks)
    layout = found.layout(axes, ranks, "")
    paths = contraction_paths(OpKind.CONV2D, layout, windows(stride))
    block = targets.get("cpu").lower(OpKind.CONV2D, layout, paths)
    assert isinstance(block, Block), block
    return layout, block


def meta(layout: Layout) -> list[Tensor]:
    return [torch.empty(shape, device="meta") for shape in layout.shapes.values()]


def measured(shape: tuple[int, int, int, int], form: str, part: float, batch: int, laps: int) -> dict[str, object]:
    inputs, outputs, size, stride = shape
    layout, block = replaced(form, inputs, outputs, stride, part)
    found = match(block)
    assert isinstance(found, Match), found
    x, bias = torch.randn(batch, inputs, size, size), torch.randn(outputs)
    dense = [torch.randn(outputs, inputs, 3, 3) for _ in range(min(POOL // (36 * inputs * outputs) + 2, 64))]
    one = {name: torch.randn(shape) / 30 for name, shape in layout.shapes.items()}
    bytes_ = 4 * sum(t.numel() for t in one.values())
    factors = [{name: t.clone() for name, t in one.items()} for _ in range(min(POOL // bytes_ + 2, 200))]
    runs: dict[str, tuple[Callable[[Any], Tensor], list[Any]]] = {
        "dense": (lambda weight: functional.conv2d(x, weight, bias, stride, 1), dense),
        "stock": (lambda given: found.reference(x, given, bias), factors),
        "kernel": (lambda given: found.run(x, given, bias), factors),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for lap in range(laps + 2):
            for place, (name, (run, pool)) in enumerate(runs.items()):
                given = pool[(lap + place * len(pool) // 3) % len(pool)]
                start = time.perf_counter()
                run(given)
                times[name].append((time.perf_counter() - start) * 1e6)
    best = {name: min(taken[2:]) for name, taken in times.items()}
    middle = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    ratios = {window.axis: float(window.stride) for window in windows(stride)}
    keep = block.macs_at(ratios) / (9 * inputs * outputs)
    row: dict[str, object] = {"keep": f"{keep:.3f}"}
    for name in runs:
        row |= {f"{name} us": f"{best[name]:.0f}", f"{name} median us": f"{middle[name]:.0f}"}
    for other in ("dense", "stock"):
        row[f"kernel to {other}"] = f"{best[other] / best['kernel']:.2f}"
        row[f"kernel to {other}, medians"] = f"{middle[other] / middle['kernel']:.2f}"
    possible = max(keep, bytes_ / (36 * inputs * outputs))
    for name, taken in (("realised", best), ("realised, medians", middle)):
        row[name] = f"{taken['dense'] / min(taken['kernel'], taken['stock']) * possible:.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.25])
    parser.add_argument("--returned", action="store_true")
    chosen = parser.parse_args()
    memory = "returned" if chosen.returned else keep_memory()
    kept = {tuple(row.get(key, "returned") for key in KEYS): row for row in read_rows(NAME)}
    new = []
    for threads, batch, part, shape, form in product(chosen.threads, chosen.batches, chosen.keep, SHAPES, FORMS):
        torch.set_num_threads(threads)
        laps = chosen.laps if batch == 1 else max(chosen.laps // 3, 5)
        row = dict(zip(KEYS, (*shape, form, part, batch, threads, memory), strict=True))
        row |= measured(shape, form, part, batch, laps)
        new.append({key: str(value) for key, value in row.items()})
        kept[tuple(new[-1][key] for key in KEYS)] = new[-1]
        print(*(f"{key} {row[key]}" for key in (*KEYS, "keep", *list(row)[-6:])), sep=", ", flush=True)
    parts = [float(row["realised"]) for row in new if float(row["dense us"]) >= LEAST]
    if parts:
        print(
            f"realised of {len(parts)} cases: least {min(parts):.2f}, median {statistics.median(parts):.2f}, greatest "
            f"{max(parts):.2f}; {sum(part >= 0.9 for part in parts)} at 0.9 or more"
        )
    write_rows(NAME, list(kept.values()))


if __name__ == "__main__":
    main()
