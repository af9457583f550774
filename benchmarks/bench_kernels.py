"""The kernels in C against dense layers and against the same factors on stock operators.

    python benchmarks/bench_kernels.py [--laps 60] [--threads 1 2] [--rows 1 4 16 128 512] [--shapes 1024x1024 ...]

Batches of 1 to 512 rows, float32, with bias. The weights are cold: each contestant goes through a pool of its own of
layers that is larger than the last-level cache, all contestants in turn in one run. With more than one thread
the processor is not pinned. ``bytes``: the weights that the factors take, of dense; a product that is bound by reading
them, or by its multiply-adds, can gain no more than the inverse, and what is beyond that comes from faster reading:
``one product`` is a dense layer by the kernel. ``realised``: the gain over dense of the better of kernel and stock
operators, as ``accelerate`` chooses, of that possible one, by least and by median times. Times in microseconds, the
least and the median over all laps; ratios of least times, beyond one where the kernel is faster. Rows go to
results/kernels.csv, in place of those of the same case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline
from tdc.kernels.c import one_product, two_products

NAME = "kernels"
KEYS = ("outputs", "inputs", "rank", "form", "rows", "threads")
POOL = 96 << 20
"""Bytes of the pool of each contestant."""
CASES = {
    "1024x1024": (1024, 1024, (128, 256, 320, 512)),
    "576x1536": (576, 1536, (104, 208, 288)),
    "3072x768": (3072, 768, (154, 307)),
    "4096x4096": (4096, 4096, (512, 1024, 1200)),
}
FORMS = ("plain", "gather before", "gather behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 128, 512])
    parser.add_argument("--shapes", nargs="*", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args()
    missing = two_products.available()
    if isinstance(missing, Decline):
        raise SystemExit(f"skipped: {missing.reason}")
    kept = {tuple(row[key] for key in KEYS): row for row in read_rows(NAME)}
    for shape in chosen.shapes:
        outputs, inputs, ranks = CASES[shape]
        pools = {"dense": dense_pool(outputs, inputs)}
        pools |= {f"one product {inputs} {who}": dense_pool(outputs, inputs) for who in WHO}
        for rank in ranks:
            pools |= {f"{form} {rank} {who}": pool(form, outputs, inputs, rank) for form in FORMS for who in WHO}
        for threads in chosen.threads:
            for rows in chosen.rows:
                for row in measured(pools, outputs, inputs, rows, threads, chosen.laps):
                    kept[tuple(str(row[key]) for key in KEYS)] = row
    write_rows(NAME, list(kept.values()))


WHO: dict[str, Callable[..., Tensor]] = {"stock": two_products.reference, "kernel": two_products.run}


def runner(name: str) -> Callable[..., Tensor]:
    """``<form> <rank> <who>``, or ``dense``."""
    who = name.rpartition(" ")[2]
    if name.startswith("one product"):
        return one_product.run if who == "kernel" else functional.linear
    return functional.linear if name == "dense" else WHO[who]


def dense_pool(outputs: int, inputs: int) -> list[tuple[Any, ...]]:
    bias = torch.randn(outputs)
    return [(torch.randn(outputs, inputs), bias) for _ in range(POOL // (4 * outputs * inputs) + 1)]


def pool(form: str, outputs: int, inputs: int, rank: int) -> list[tuple[Any, ...]]:
    """Operands behind x."""
    before, behind = form == "gather before", form == "gather behind"
    shapes = (rank, inputs - rank if before else inputs), (outputs - rank if behind else outputs, rank)
    order = torch.randperm(inputs).int() if before else None
    place = torch.randperm(outputs).int() if behind else None
    bias, size = torch.randn(outputs), sum(a * b for a, b in shapes) * 4
    return [(*(torch.randn(shape) for shape in shapes), bias, order, place, behind) for _ in range(POOL // size + 1)]


def measured(
    pools: dict[str, list[tuple[Any, ...]]], outputs: int, inputs: int, rows: int, threads: int, laps: int
) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    x = torch.randn(rows, inputs)
    taken: dict[str, list[float]] = {name: [] for name in pools}
    runs = {name: runner(name) for name in pools}
    laps = laps if rows < 100 else max(laps // 4, 10)
    with torch.inference_mode():
        for lap in range(laps + 2):
            for name, run in runs.items():
                operands = pools[name][lap % len(pools[name])]
                start = time.perf_counter()
                run(x, *operands)
                taken[name].append((time.perf_counter() - start) * 1e6)
    best = {name: min(times[2:]) for name, times in taken.items()}
    middle = {name: statistics.median(times[2:]) for name, times in taken.items()}
    found = []
    for name in (name for name in pools if name.endswith("kernel")):
        label = name.removesuffix(" kernel")
        form, _, rank = label.rpartition(" ")
        size = sum(t.numel() for t in pools[name][0] if isinstance(t, Tensor) and t.ndim == 2) / (outputs * inputs)
        row: dict[str, object] = dict(zip(KEYS, (outputs, inputs, int(rank), form, rows, threads), strict=True))
        row |= {"bytes": f"{size:.3f}"}
        for who, other in (("dense", "dense"), ("stock", f"{label} stock"), ("kernel", name)):
            row |= {f"{who} us": f"{best[other]:.1f}", f"{who} median us": f"{middle[other]:.1f}"}
        row["stock to dense"] = f"{best['dense'] / best[f'{label} stock']:.2f}"
        row["kernel to dense"] = f"{best['dense'] / best[name]:.2f}"
        row["kernel to dense, medians"] = f"{middle['dense'] / middle[name]:.2f}"
        for suffix, times in (("", best), (", medians", middle)):
            gain = times["dense"] / min(times[f"{label} stock"], times[name])
            row[f"realised{suffix}"] = f"{gain * size:.2f}"
        row["kernel to stock"] = f"{best[f'{label} stock'] / best[name]:.2f}"
        found.append(row)
        print(*(f"{key} {row[key]}" for key in (*KEYS, "bytes", *list(row)[-6:])), sep=", ", flush=True)
    return found


if __name__ == "__main__":
    main()
