"""The Triton kernels on an NVIDIA GPU against dense layers (cuBLAS, cuDNN) and the same factors on stock operators.

    python benchmarks/bench_gpu.py [--only decode prefill convolution] [--compile 0/8]

All times are of replays of CUDA graphs, in microseconds, contestants in turn in one run, the least and the median over
all laps. ``decode``: few tokens; the weights are cold, each contestant goes through a pool of its own that is larger
than four times the L2 cache; ``of bandwidth``: bytes of the factors over the time, as a part of what a large copy on
the same device moves (bytes read and written). ``kernel`` is that for few rows; the operator takes it or cuBLAS, by
rule, ``taken``. ``called us``: the time of a call from Python, without a graph.
``prefill``: many tokens; ``of rate``: operations over the time, as a part of a large product by cuBLAS in that type.
``convolution``: channels last, hot, ``tokens`` images; dense and stock by cuDNN (its best algorithm), ``products``: the
pointwise ones by cuBLAS; each way to run it, and ``kernel``, which takes one of them by rule. Errors: largest
difference to float64, over the largest entry. Rows go to results/gpu.csv, in place of those of the same case.
``--compile k/n`` compiles the kernels of every n-th case and measures
nothing, so that several processes can fill Triton's cache.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor
from torch.nn import functional

from tdc.ir import Decline
from tdc.kernels.c.two_products import reference
from tdc.kernels.triton import device, joint_products, three_convolutions, two_products

NAME = "gpu"
KEYS = ("part", "form", "outputs", "inputs", "rank", "tokens", "stride", "dtype", "gpu")
LAPS = 15
LINEARS = ((4096, 4096), (11008, 4096), (4096, 14336), (28672, 8192), (128256, 4096))
CONVOLUTIONS = (
    (64, 64, 56, 1), (128, 128, 28, 1), (256, 256, 14, 1), (512, 512, 7, 1),
    (64, 128, 56, 2), (128, 256, 28, 2), (256, 512, 14, 2), (128, 128, 56, 2), (256, 256, 28, 2),
)  # fmt: skip
"""Inputs, outputs, height and width, stride of the 3 x 3 convolutions of ResNet-18 and -50 at 224 x 224."""
Run = Callable[[], Any]
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--compile", default="", help="k/n: only compile, every n-th case")
    chosen = parser.parse_args()
    missing = device.available()
    if isinstance(missing, Decline):
        raise SystemExit(f"skipped: {missing.reason}")
    torch.backends.cudnn.benchmark = True
    share, of = map(int, chosen.compile.split("/")) if chosen.compile else (0, 0)
    bench = Bench(share, of)
    kept = {tuple(row[key] for key in KEYS): row for row in read_rows(NAME)}
    for part in chosen.only:
        for row in PARTS[part](bench):
            row = {"part": part, "gpu": torch.cuda.get_device_name(), "triton": bench.triton, **row}
            row = {**dict.fromkeys(KEYS, ""), **row}
            kept[tuple(str(row[key]) for key in KEYS)] = row
            print(*(f"{key} {value}" for key, value in row.items() if value != ""), sep=", ", flush=True)
            if not of:
                write_rows(NAME, list(kept.values()))


class Bench:
    """What is measured, and the ceilings of the device."""

    def __init__(self, share: int, of: int) -> None:
        import triton

        self.triton = triton.__version__
        self.share, self.of, self.count = share, of, 0
        self.made = torch.Generator("cuda").manual_seed(0)
        self.cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self.bandwidth, self.rate = 0.0, dict[torch.dtype, float]()
        if not of:
            self.bandwidth = self._bandwidth()
            self.rate = {t: self._rate(t) for t in (torch.float16, torch.bfloat16)}

    def random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.made, device="cuda") * scale).to(dtype)

    def skips(self) -> bool:
        """Whether the next case is another process's to compile."""
        self.count += 1
        return bool(self.of) and self.count % self.of != self.share

    def times(self, runs: dict[str, list[Run]]) -> dict[str, tuple[float, float]]:
        """Least and median seconds of one call of each contestant, which is given as calls on its pool."""
        graphs = {}
        for name, calls in runs.items():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for call in calls[: 2 if self.of else None]:
                    call()
            torch.cuda.synchronize()
            if self.of:
                continue
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for call in calls:
                    call()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(LAPS + 2):
            for name, graph in graphs.items():
                taken[name].append(seconds(graph.replay) / len(runs[name]))
        return {name: (min(times[2:]), statistics.median(times[2:])) for name, times in taken.items() if times}

    def called(self, calls: list[Run]) -> float:
        """Seconds of one call from Python."""

        def burst() -> None:
            for k in range(40):
                calls[k % len(calls)]()

        return 0.0 if self.of else min(seconds(burst) for _ in range(5)) / 40

    def _bandwidth(self) -> float:
        source = torch.randn(1 << 30, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(8))

    def _rate(self, dtype: torch.dtype) -> float:
        n = 8192
        a, b = (self.random(n, n, dtype=dtype) for _ in range(2))
        return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(8))


def seconds(run: Run) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def error(found: Tensor, right: Tensor) -> str:
    return f"{((found.double() - right).abs().max() / right.abs().max()).item():.1e}"


def as_double(given: Any) -> Any:
    if isinstance(given, list | tuple):
        return type(given)(as_double(one) for one in given)
    return given.double() if isinstance(given, Tensor) and given.is_floating_point() else given


def ceilings(bench: Bench) -> list[Row]:
    if bench.of:
        return []
    rates = [
        {"form": "product", "dtype": str(t).removeprefix("torch."), "TFLOP/s": f"{rate / 1e12:.0f}"}
        for t, rate in bench.rate.items()
    ]
    return [{"form": "copy", "TB/s": f"{bench.bandwidth / 1e12:.2f}"}, *rates]


FORMS = {
    "low rank": (False, False),
    "pivoted, gather before": (True, False),
    "pivoted, gather behind": (False, True),
}


def kept_rank(form: str, outputs: int, inputs: int, keep: float) -> int:
    """The rank, a multiple of 8, at which the factors have that part of the dense weight's numbers."""
    size, both = keep * outputs * inputs, outputs + inputs
    rank = size / both if form == "low rank" else (both - math.sqrt(both**2 - 4 * size)) / 2
    return int(rank / 8) * 8


def factors(bench: Bench, form: str, outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Operands behind x."""
    before, behind = FORMS[form]
    columns, rows = inputs - rank * before, outputs - rank * behind
    return (
        bench.random(rank, columns, dtype=dtype, scale=columns**-0.5),
        bench.random(rows, rank, dtype=dtype, scale=rank**-0.5),
        bench.random(outputs, dtype=dtype),
        torch.randperm(inputs, device="cuda").int() if before else None,
        torch.randperm(outputs, device="cuda").int() if behind else None,
        behind,
    )


def decode(bench: Bench) -> Any:
    for dtype in (torch.float16, torch.bfloat16):
        for outputs, inputs in LINEARS:
            for form in FORMS if outputs <= 11008 else ("low rank",):
                rank = kept_rank(form, outputs, inputs, 0.5)
                yield from decoded(bench, form, outputs, inputs, rank, dtype)
        yield from joined(bench, dtype)
    yield from decoded(bench, "low rank", 4096, 4096, 1024, torch.float32)


def decoded(bench: Bench, form: str, outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> Any:
    if bench.skips():
        return
    one = factors(bench, form, outputs, inputs, rank, dtype)
    size = sum(t.nbytes for t in one[:2])
    count, dense_count = (2 if bench.of else bench.cold // n + 2 for n in (size, outputs * inputs * dtype.itemsize))
    pool = [one] + [(one[0].clone(), one[1].clone(), *one[2:]) for _ in range(count - 1)]
    dense = [bench.random(outputs, inputs, dtype=dtype, scale=inputs**-0.5) for _ in range(dense_count)]
    for tokens in (1, 8, 32):
        x = bench.random(tokens, inputs, dtype=dtype)
        runs: dict[str, list[Run]] = {"dense": [lambda x=x, w=w: functional.linear(x, w, one[2]) for w in dense]}
        runs["stock"] = [lambda x=x, given=given: reference(x, *given) for given in pool]
        runs["kernel"] = [lambda x=x, given=given: two_products.run(x, *given, by="few") for given in pool]
        right = None if bench.of else reference(*as_double((x, *one)))
        case = {"form": form, "outputs": outputs, "inputs": inputs, "rank": rank, "tokens": tokens}
        case["taken"] = two_products.few(tokens, *one[:2])
        yield weighed(bench, case, dtype, runs, size, right)


def joined(bench: Bench, dtype: torch.dtype) -> Any:
    """Query, key and value of a layer with grouped heads."""
    if bench.skips():
        return
    inputs, outputs, rank = 4096, (4096, 1024, 1024), 1024
    shapes = [(rank, inputs), *((o, rank) for o in outputs)]
    size = sum(a * b for a, b in shapes) * 2
    pool = [[bench.random(*s, dtype=dtype, scale=s[1] ** -0.5) for s in shapes] for _ in range(bench.cold // size + 2)]
    dense = [bench.random(sum(outputs), inputs, dtype=dtype, scale=inputs**-0.5) for _ in range(8)]
    for tokens in (1, 8, 32):
        x = bench.random(tokens, inputs, dtype=dtype)
        runs: dict[str, list[Run]] = {"dense": [lambda x=x, w=w: functional.linear(x, w) for w in dense]}
        for name, run in (("stock", joint_products.reference), ("kernel", joint_products.run)):
            runs[name] = [lambda x=x, w=w, run=run: run(x, w[0], w[1:])[0] for w in pool]
        right = None if bench.of else joint_products.reference(*as_double((x, pool[0][0], pool[0][1:])))[0]
        case = {"form": "joint, 3 outputs", "outputs": sum(outputs), "inputs": inputs, "rank": rank, "tokens": tokens}
        case["taken"] = two_products.few(tokens, *pool[0])
        yield weighed(bench, case, dtype, runs, size, right)


def weighed(
    bench: Bench, case: Row, dtype: torch.dtype, runs: dict[str, list[Run]], size: int, right: Tensor | None
) -> Row:
    row = {**case, "dtype": str(dtype).removeprefix("torch."), "MB": f"{size / 1e6:.1f}"}
    times = bench.times(runs)
    if right is None:
        return row
    row |= spread(times)
    row["of bandwidth"] = f"{size / times['kernel'][0] / bench.bandwidth:.3f}"
    row["stock of bandwidth"] = f"{size / times['stock'][0] / bench.bandwidth:.3f}"
    for name in ("stock", "kernel"):
        row[f"{name} called us"] = f"{bench.called(runs[name]) * 1e6:.1f}"
        row[f"{name} error"] = error(runs[name][0](), right)
    return row


def spread(times: dict[str, tuple[float, float]]) -> Row:
    """Least and median times, and the kernel's ratios to dense and stock."""
    row: Row = {}
    for name, (least, median) in times.items():
        row |= {f"{name} us": f"{least * 1e6:.2f}", f"{name} median us": f"{median * 1e6:.2f}"}
    for other in ("dense", "stock"):
        row[f"kernel to {other}"] = f"{times[other][0] / times['kernel'][0]:.2f}"
        row[f"kernel to {other}, medians"] = f"{times[other][1] / times['kernel'][1]:.2f}"
    return row


def prefill(bench: Bench) -> Any:
    dtype = torch.bfloat16
    cases = [(form, *size, kept_rank(form, *size, 0.5)) for size in LINEARS[:3] for form in FORMS]
    for form, outputs, inputs, rank in (*cases, ("low rank", 4096, 4096, 256), ("low rank", 11008, 4096, 1536)):
        if bench.of:
            return
        given = factors(bench, form, outputs, inputs, rank, dtype)
        dense = bench.random(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
        for tokens in (2048, 8192):
            x = bench.random(tokens, inputs, dtype=dtype)
            runs: dict[str, list[Run]] = {
                "dense": [lambda x=x, w=dense, b=given[2]: functional.linear(x, w, b)] * 5,
                "stock": [lambda x=x, given=given: reference(x, *given)] * 5,
                "kernel": [lambda x=x, given=given: two_products.run(x, *given)] * 5,
            }
            times = bench.times(runs)
            work = 2 * tokens * (given[0].numel() + given[1].numel())
            row: Row = {"form": form, "outputs": outputs, "inputs": inputs, "rank": rank, "tokens": tokens}
            row |= {"dtype": "bfloat16", **spread(times)}
            row["of rate"] = f"{work / times['kernel'][0] / bench.rate[dtype]:.3f}"
            row["stock of rate"] = f"{work / times['stock'][0] / bench.rate[dtype]:.3f}"
            row["dense of rate"] = f"{2 * tokens * dense.numel() / times['dense'][0] / bench.rate[dtype]:.3f}"
            right = reference(*as_double((x, *given)))
            row |= {f"{name} error": error(runs[name][0](), right) for name in ("stock", "kernel")}
            yield row


def convolution(bench: Bench) -> Any:
    for inputs, outputs, size, stride in CONVOLUTIONS:
        for keep in (0.25, 0.5):
            numbers = keep * 9 * inputs * outputs
            rank = int((math.sqrt((inputs + outputs) ** 2 + 36 * numbers) - inputs - outputs) / 18 / 8 + 0.5) * 8
            for batch in (1, 16, 64):
                if not bench.skips():
                    yield slid(bench, (inputs, outputs, size, stride), rank, keep, batch)


def slid(bench: Bench, case: tuple[int, int, int, int], rank: int, keep: float, batch: int) -> Row:
    (inputs, outputs, size, stride), dtype = case, torch.float16
    x = bench.random(batch, inputs, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dense = bench.random(outputs, inputs, 3, 3, dtype=dtype, scale=(9 * inputs) ** -0.5)
    core = bench.random(rank, rank, 3, 3, dtype=dtype, scale=(9 * rank) ** -0.5)
    dense, core = (t.contiguous(memory_format=torch.channels_last) for t in (dense, core))
    first = bench.random(rank, inputs, dtype=dtype, scale=inputs**-0.5)
    last, bias = bench.random(outputs, rank, dtype=dtype, scale=rank**-0.5), bench.random(outputs, dtype=dtype)
    given = (x, first, core, last, bias, (stride, stride), (1, 1))

    def ways() -> Any:
        lines = (size - 1) // stride + 1
        yield "kernel", lambda: three_convolutions.run(*given)
        for by in three_convolutions.METHODS:
            if by == "stock":
                yield "products", lambda: three_convolutions.run(*given, by="stock")
            elif rank <= three_convolutions.WIDEST and (by != "whole" or lines <= 64):
                yield by, lambda by=by: three_convolutions.run(*given, by=by)

    runs: dict[str, list[Run]] = {
        "dense": [lambda: functional.conv2d(x, dense, bias, stride, 1)] * 20,
        "stock": [lambda: three_convolutions.reference(*given)] * 20,
        **{name: [call] * 20 for name, call in ways()},
    }
    row: Row = {"form": f"keep {keep}", "outputs": outputs, "inputs": f"{inputs} x {size} x {size}", "rank": rank}
    row |= {"tokens": batch, "stride": stride, "dtype": "float16"}
    times = bench.times(runs)
    if bench.of:
        return row
    positions = batch * ((size - 1) // stride + 1) ** 2
    row |= spread(times)
    row["method"] = three_convolutions.method(x, core, positions, (size - 1) // stride + 1)
    right = three_convolutions.reference(*as_double(given))
    return row | {f"{name} error": error(runs[name][0](), right) for name in ("stock", "kernel")}


PARTS: dict[str, Callable[[Bench], Any]] = {
    "ceilings": ceilings,
    "decode": decode,
    "prefill": prefill,
    "convolution": convolution,
}


if __name__ == "__main__":
    main()
