"""Measuring a machine: times of products, convolutions, gathers and copies, of TDC's kernels and of an empty call.

Operations of one kind and many sizes are called in turn, so that other work on the machine meets all of them, and again
later; each reads another copy of its weights from call to call, from a pool larger than the caches. A coarse grid comes
first, twice, then the points between its own while there is time, and then all of them again.
"""

from __future__ import annotations

import datetime
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import OptionError
from ..ir.machine import Table, Timing, Work
from ..kernels.c import one_product, two_products
from ..progress import counted
from ._table import fingerprint

__all__ = ["measure"]

Run = Callable[[], object]
_POOL = 24 << 20
"""Numbers of weights: 96 MiB, more than most caches hold."""
_COPIES = 12
_GROUP = 12
_LAPS = (5, 25)
_GROUP_SECONDS = 0.2
_MOST_MACS = {"gemm": 4.4e9, "conv": 0.8e9}
_DRIFT = 0.05
_SENTINEL = Work("gemm", (256.0, 512.0, 512.0))


class _Pool:
    """Weights: views of one large tensor, one behind the other, so that what is handed out was not read for long."""

    def __init__(self) -> None:
        self.numbers = torch.randn(_POOL)
        self.place = 0

    def copies(self, *shape: int) -> list[Tensor]:
        size = math.prod(shape)
        return [self._next(size).view(shape) for _ in range(max(1, min(_COPIES, _POOL // (2 * size))))]

    def _next(self, size: int) -> Tensor:
        if size > _POOL:
            return torch.randn(size)
        if self.place + size > _POOL:
            self.place = 0
        self.place += size
        return self.numbers[self.place - size : self.place]


def measure(seconds: float = 120.0, threads: int | None = None, *, progress: bool = False) -> Table:
    """The times of this machine, measured for about so many seconds with so many threads (default: as torch has it).

    Raises OptionError for numbers that make no sense.
    """
    if not 0 < seconds < math.inf:
        raise OptionError(f"seconds must be above 0; got {seconds!r}")
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1; got {threads}")
    with _threads(threads), torch.inference_mode():
        return _measured(time.monotonic() + seconds, progress)


def _measured(deadline: float, progress: bool) -> Table:
    marks = fingerprint()
    pool, taken = _Pool(), dict[Work, list[float]]()
    for work in _first():
        _time([work], pool, taken)
    before = min(_time([_SENTINEL], pool, taken))
    first, *others = [_groups(tier) for tier in _tiers()]
    groups = [*first, *(group for tier in others for group in tier)]
    order = [*first, *first, *groups[len(first) :], *groups]
    slowest = 0.0
    with counted("measuring this machine", len(order), show=progress) as advance:
        for group in order:
            start = time.monotonic()
            if start + slowest < deadline:
                _time(group, pool, taken)
                slowest = max(0.5 * slowest, time.monotonic() - start)
            advance()
    drift = min(_time([_SENTINEL], pool, taken)) / before - 1
    timings = {
        work: Timing(float(f"{min(own):.4g}"), float(f"{statistics.median(own):.4g}")) for work, own in taken.items()
    }
    left_out = sum(work not in taken for group in groups for work in group)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return Table(marks, timings, date, float(f"{drift:.4g}"), abs(drift) > _DRIFT, left_out)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _time(works: Sequence[Work], pool: _Pool, taken: dict[Work, list[float]]) -> list[float]:
    """Call the works in turn, several times each; the seconds go to those that they have. Gives those of the last."""
    contestants = [_runs(work, pool) for work in works]
    first = []
    for copies in contestants:
        copies[0]()
        first.append(_once(copies[-1]))
    laps = min(max(math.ceil(_GROUP_SECONDS / max(sum(first), 1e-6)), _LAPS[0]), _LAPS[1])
    for lap in range(laps):
        for work, copies in zip(works, contestants, strict=True):
            taken.setdefault(work, []).append(_once(copies[lap % len(copies)]))
    return taken[works[-1]][-laps:]


def _once(run: Run) -> float:
    """Seconds of a call: of the processor's work in this thread where there is no other, so that other processes, which
    take the processor away for a while, hardly count.
    """
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    run()
    return max(now() - start - _own_cost(now), 1e-9)


@cache
def _own_cost(now: Callable[[], float]) -> float:
    """What asking for the time takes."""
    return min(-now() + now() for _ in range(200))


def _runs(work: Work, pool: _Pool) -> list[Run]:
    """Calls of an operation, each with other weights."""
    kind, _, window = work.kind.partition(" ")
    return _MAKERS[kind](pool, window, getattr(torch, work.dtype), *map(int, work.sizes))


def _gemm(pool: _Pool, _: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Run]:
    x = torch.randn(rows, inputs).to(dtype)
    weights = pool.copies(outputs, inputs)
    if dtype is not torch.float32:
        weights = [weight.to(dtype) for weight in weights[:2]]
    return [lambda w=weight: functional.linear(x, w) for weight in weights]  # type: ignore[misc]


def _bmm(pool: _Pool, _: str, dtype: torch.dtype, batch: int, rows: int, inputs: int, outputs: int) -> list[Run]:
    x = torch.randn(batch, rows, inputs)
    return [lambda w=w: torch.bmm(x, w) for w in pool.copies(batch, inputs, outputs)]  # type: ignore[misc]


def _conv(pool: _Pool, window: str, dtype: torch.dtype, examples: int, plane: int, i: int, o: int) -> list[Run]:
    stride = _window(window)[1]
    sides = (stride * side for side in _square(plane))
    return _convolutions(pool, window, torch.randn(examples, i, *sides), (o, i), 1)


def _depthwise(pool: _Pool, window: str, dtype: torch.dtype, examples: int, plane: int, channels: int) -> list[Run]:
    return _convolutions(pool, window, torch.randn(examples, channels, *_square(plane)), (channels, 1), channels)


def _convolutions(pool: _Pool, window: str, x: Tensor, channels: tuple[int, int], groups: int) -> list[Run]:
    taps, stride = _window(window)
    pads = [size // 2 for size in taps]
    weights = pool.copies(*channels, *taps)
    return [lambda w=w: functional.conv2d(x, w, None, stride, pads, 1, groups) for w in weights]  # type: ignore[misc]


def _window(text: str) -> tuple[list[int], int]:
    """``3x3/2``: the taps, and the stride."""
    taps, _, stride = text.partition("/")
    return [int(size) for size in taps.split("x")], int(stride or 1)


def _square(plane: int) -> tuple[int, int]:
    side = math.isqrt(plane)
    return side, plane // side


def _take(pool: _Pool, window: str, dtype: torch.dtype, *sizes: int) -> list[Run]:
    if window == "planes":
        examples, plane, channels = sizes
        x, index = torch.randn(examples, channels, *_square(plane)), torch.randperm(channels).int()
        return [lambda: x.index_select(1, index)]
    x, index = torch.randn(sizes), torch.randperm(sizes[1]).int()
    return [lambda: x.index_select(-1, index)]


def _concat(pool: _Pool, _: str, dtype: torch.dtype, rows: int, entries: int) -> list[Run]:
    parts = torch.randn(rows, entries // 2), torch.randn(rows, entries - entries // 2)
    return [lambda: torch.cat(parts, -1)]


def _add(pool: _Pool, _: str, dtype: torch.dtype, rows: int, entries: int) -> list[Run]:
    a, b = torch.randn(rows, entries), torch.randn(rows, entries)
    return [lambda: a + b]


def _copy(pool: _Pool, _: str, dtype: torch.dtype, size: int) -> list[Run]:
    source, destination = torch.randn(size // 8), torch.empty(size // 8)
    return [lambda: destination.copy_(source)]


def _launch(pool: _Pool, _: str, dtype: torch.dtype) -> list[Run]:
    x, weight = torch.randn(1, 1), torch.randn(1, 1)
    return [lambda: functional.linear(x, weight)]


def _two(pool: _Pool, _: str, dtype: torch.dtype, rows: int, inputs: int, rank: int, outputs: int) -> list[Run]:
    x = torch.randn(rows, inputs)
    pairs = zip(pool.copies(rank, inputs), pool.copies(outputs, rank), strict=False)
    return [lambda a=a, b=b: two_products.run(x, a, b) for a, b in pairs]  # type: ignore[misc]


def _one(pool: _Pool, _: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Run]:
    x = torch.randn(rows, inputs)
    return [lambda w=w: one_product.run(x, w) for w in pool.copies(outputs, inputs)]  # type: ignore[misc]


_MAKERS: dict[str, Callable[..., list[Run]]] = {
    "gemm": _gemm,
    "bmm": _bmm,
    "conv": _conv,
    "depthwise": _depthwise,
    "take": _take,
    "concat": _concat,
    "add": _add,
    "copy": _copy,
    "launch": _launch,
    "two": _two,
    "one": _one,
}


def _first() -> list[Work]:
    """What the model of the machine is fitted to."""
    copies = [Work("copy", (float(1 << power),)) for power in (14, 17, 20, 23, 26)]
    return [Work("launch", ()), *copies, Work("gemm", (1.0, 2048.0, 2048.0))]


def _tiers() -> Iterator[list[Work]]:
    """Coarse grids, then what is between."""
    rates = [Work("gemm", (n, n, n), dtype) for dtype in ("float64", "bfloat16") for n in (256.0, 512.0, 1024.0)]
    rows, widths = (1, 4, 16, 64, 256, 1024), (8, 32, 128, 512, 2048, 4096)
    windows = ("1x1", "3x3", "3x1", "1x3")
    channels = (16, 48, 192, 576)  # planes of channels that are powers of two apart share cache sets: not these
    conv = [_grid(f"conv {w}", (1, 16), (4, 64, 784), channels, channels) for w in windows]
    conv.append(_grid("conv 1x1", (1, 16), (4, 64, 784), (1728,), (*channels, 1728)))
    conv.append(_grid("conv 1x1", (1, 16), (4, 64, 784), channels, (1728,)))
    coarse = [*rates, *_grid("gemm", rows, widths, widths), *itertools.chain(*conv)]
    coarse += [w for t in ("1x1/2", "3x3/2") for w in _grid(f"conv {t}", (1, 16), (16, 196, 784), (48, 192), (48, 192))]
    coarse += _grid("take", (1, 16, 256, 4096), (16, 256, 4096))
    coarse += _grid("take planes", (1, 16), (16, 196, 3136), (16, 128, 512))
    coarse += [w for kind in ("concat", "add") for w in _grid(kind, (1, 16, 512), (64, 1024, 16384, 262144))]
    yield coarse
    if two_products.available() is None:
        yield [
            *_grid("two products", rows[:-1], (256, 1024, 2048), (32, 128, 512), (256, 1024, 2048)),
            *_grid("one product", rows[:-1], (64, 256, 1024, 2048), (64, 256, 1024, 2048)),
        ]
    middle = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    yield [w for w in _grid("gemm", rows, middle, middle) if w not in coarse]
    yield [w for window in windows for w in _grid(f"conv {window}", (1, 16), (16, 196, 3136), channels, channels)]
    large = [f"conv {a}" for n in (5, 7) for a in (f"{n}x{n}", f"{n}x1", f"1x{n}")]
    yield [w for kind in large for w in _grid(kind, (1, 16), (16, 196, 784), channels[:3], channels[:3])]
    yield [
        *_grid("bmm", (4, 16, 64), (16, 256, 4096), (4, 16, 64), (4, 16, 64)),
        *(w for t in windows[1:] for w in _grid(f"depthwise {t}", (1, 16), (16, 196, 3136), (16, 48, 192))),
    ]
    yield [w for t in windows for w in _grid(f"conv {t}", (1, 16), (64, 784), (3, 32, 96), (*channels, 32, 96))]
    yield _grid("gemm", (2, 8, 32, 128, 512), middle, middle)


def _grid(kind: str, *lines: Sequence[int]) -> list[Work]:
    works = [Work(kind, tuple(map(float, sizes))) for sizes in itertools.product(*lines)]
    return [work for work in works if _macs(work) <= _MOST_MACS.get(kind.split()[0], math.inf) and _fits(work)]


def _macs(work: Work) -> float:
    taps = math.prod(_window(work.kind.split()[1])[0]) if work.kind.startswith("conv") else 1
    return math.prod(work.sizes) * taps


def _fits(work: Work) -> bool:
    """Whether the activations are less than 400 MB."""
    axes = 1 if work.kind == "gemm" else 2
    return math.prod(work.sizes[:axes]) * max(work.sizes[axes:], default=1.0) < 1e8


def _groups(works: list[Work]) -> list[list[Work]]:
    """Works of one kind and any sizes in a group; all groups in any order."""
    chance, kinds = random.Random(0), dict[str, list[Work]]()
    for work in works:
        kinds.setdefault(work.kind, []).append(work)
    groups = []
    for own in kinds.values():
        chance.shuffle(own)
        groups += [own[k : k + _GROUP] for k in range(0, len(own), _GROUP)]
    chance.shuffle(groups)
    return groups
