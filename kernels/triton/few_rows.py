"""One product for few rows of activations, bound by reading the weight: ``b i, o i -> b o``.

A program multiplies all rows by a tile of the weight, ``n`` of its rows by one of ``split`` parts of its columns; the
program that is the last one of a tile to end adds the parts up in their order, so results do not depend on which it is.
On chips that overlap dependent launches, a program begins while the launch before it ends, and waits for it before it
reads x or writes; where that launch is known not to write the weight (``early``), and a program reads its part of it
whole, that is read before.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import chip, counters, interpreted

__all__ = ["Tiling", "gathered", "kernel", "product", "tiling"]

MOST_ROWS = 64


@dataclass(frozen=True)
class Tiling:
    """``rows`` (a power of two, those of x and more), ``n`` rows and ``k`` columns of the weight at a time, ``split``
    parts of the columns, ``warps`` of a program, ``stages`` of its loads.
    """

    rows: int
    n: int
    k: int
    split: int
    warps: int = 4
    stages: int = 3

    def part(self, inputs: int) -> int:
        """Columns of one part."""
        return triton.cdiv(inputs, self.split * self.k) * self.k


def tiling(rows: int, outputs: int, inputs: int, size: int, processors: int) -> Tiling:
    """For numbers of ``size`` bytes, measured on an H200. Weights of up to 16 MB, for one row of up to 48 MB, come in
    pieces of 32 or 64 kB that a program holds whole in registers; others in a loop. Where there are fewer tiles than
    multiprocessors, the columns are split so that all have as much to do.
    """
    weight = outputs * inputs * size
    if rows == 1 and (inputs * size <= 4096 or weight <= 48 << 20):
        k = min(triton.next_power_of_2(max(inputs, 1)), 8192 // size)
        return Tiling(1, min(max(32768 // (k * size), 1), 32), k, max(triton.cdiv(inputs, k), 1), 4, 1)
    padded = 1 if rows == 1 else max(16, triton.next_power_of_2(rows))
    if rows > 1 and weight <= 16 << 20:
        k = min(max(16, triton.next_power_of_2(max(inputs, 1))), 1024 // size)
        return Tiling(padded, 128 // size, k, max(triton.cdiv(inputs, k), 1), 4, 1)
    wide = outputs >= 64 * processors
    if rows == 1:
        n, k, stages, wanted = 16, 512 // size, 4, 4 * processors
    else:
        n, k, stages, wanted = 128 if padded >= 32 and wide else 64, 256 // size, 3, 3 * processors // 2
    most = 1 if wide else max(min(triton.cdiv(inputs, k) // 4, 16), 1)
    return Tiling(padded, n, k, _split(triton.cdiv(outputs, n), most, wanted, processors), 4, stages)


def _split(tiles: int, most: int, wanted: int, processors: int) -> int:
    """The fewest parts at which there are ``wanted`` programs and nine tenths of their last round are busy."""

    def busy(split: int) -> float:
        rounds = triton.cdiv(tiles * split, processors)
        return tiles * split / (rounds * processors)

    some = [split for split in range(1, most + 1) if tiles * split >= wanted] or [most]
    return next((split for split in some if busy(split) >= 0.9), max(some, key=busy))


@triton.jit
def gathering(
    x: tensor, order: tensor, bias: tensor, y: tensor, WIDTH: tensor, N: tensor, OVERLAPS: constexpr, BLOCK: constexpr
) -> None:
    """y (rows, N) = x[:, order] + bias; an index out of range gives NaN."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(order + n, mask=n < N, other=0)
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * WIDTH + at, mask=(at >= 0) & (at < WIDTH), other=float("nan"))
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0)
    tl.store(y + row * N + n, value, mask=n < N)


@triton.jit
def _finish(
    total: tensor,
    x: tensor,
    bias: tensor,
    y: tensor,
    entry: tensor,
    n: tensor,
    m: tensor,
    M: tensor,
    N: tensor,
    R: tensor,
    WIDTH: tensor,
    PASSED: constexpr,
    STACKED: constexpr,
) -> None:
    """What passes by the product, and the bias, are added; an index out of range gives NaN."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    if PASSED:
        total += tl.load(x + m[:, None] * WIDTH + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if STACKED:
        whole = (entry >= 0) & (entry < N)
        beside = inside & (entry < R)[None, :] & whole[None, :]
        total += tl.load(x + m[:, None] * WIDTH + entry[None, :], mask=beside, other=0.0).to(tl.float32)
        total = tl.where(whole[None, :], total, float("nan"))
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None].to(tl.int64) * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _tile(w: tensor, row: tensor, live: tensor, k: tensor, K: tensor) -> tensor:
    """Rows of the weight, columns k."""
    return tl.load(w + row[:, None].to(tl.int64) * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _step(
    acc: tensor, weight: tensor, x: tensor, k: tensor, m: tensor, M: tensor, K: tensor, first: tensor, WIDTH: tensor,
    ROWS: constexpr, PRECISION: constexpr,
) -> tensor:  # fmt: skip
    """Adds all rows of x, columns first + k, by the tile, (ROWS, n). One row does without matrix units, its products
    (n, k) are summed later.
    """
    if ROWS == 1:
        value = tl.load(x + first + k, mask=k < K, other=0.0).to(tl.float32)
        result = acc + weight.to(tl.float32) * value[None, :]
    else:
        at = m[:, None] * WIDTH + first + k[None, :]
        value = tl.load(x + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        result = tl.dot(value, weight.T, acc, input_precision=PRECISION)
    return result


@triton.jit
def kernel(
    x: tensor, w: tensor, bias: tensor, place: tensor, y: tensor,
    parts: tensor, count: tensor, M: tensor, N: tensor, K: tensor, R: tensor, WIDTH: tensor, ALIGNED: constexpr,
    PART: constexpr, ROWS: constexpr, BN: constexpr, BK: constexpr, SPLIT: constexpr,
    PASSED: constexpr, STACKED: constexpr, OVERLAPS: constexpr, EARLY: constexpr,
    PRECISION: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """y (M, N). x (M, WIDTH), w (N, K) or, stacked, (N - R, K); place (N,). K, R and WIDTH come divided by ALIGNED, so
    that the compiler knows that they are multiples of it and reads as wide as that allows.
    """
    K, R, WIDTH = K * ALIGNED, R * ALIGNED, WIDTH * ALIGNED
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m = tile * BN + tl.arange(0, BN), tl.arange(0, ROWS)
    above = R if STACKED else 0
    before = R if PASSED else 0
    k = split * PART + tl.arange(0, BK)
    if OVERLAPS and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    entry = n
    if place is not None:
        entry = tl.load(place + n, mask=n < N, other=0)
    row = entry - above
    live = (n < N) & (row >= 0) & (row < N - above)
    total = tl.zeros([BN, BK] if ROWS == 1 else [ROWS, BN], tl.float32)
    if PART == BK:
        weight = _tile(w, row, live, k, K)
        if OVERLAPS and EARLY:
            gdc_wait()
            gdc_launch_dependents()
        total = _step(total, weight, x, k, m, M, K, before, WIDTH, ROWS, PRECISION)
    else:
        tl.static_assert(not EARLY, "what is read early is read whole")
        for start in tl.range(0, PART, BK, num_stages=STAGES):
            weight = _tile(w, row, live, k + start, K)
            total = _step(total, weight, x, k + start, m, M, K, before, WIDTH, ROWS, PRECISION)
    if ROWS == 1:
        total = tl.sum(total, 1)[None, :]
    if SPLIT == 1:
        _finish(total, x, bias, y, entry, n, m, M, N, R, WIDTH, PASSED, STACKED)
    else:
        inside = (m < M)[:, None] & (n < N)[None, :]
        own = parts + m[:, None] * N + n[None, :]
        tl.store(own + split * M * N, total, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(count + tile, 1, sem="acq_rel") == SPLIT - 1:
            whole = tl.zeros([ROWS, BN], tl.float32)
            for s in tl.static_range(SPLIT):
                whole += tl.load(own + s * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(whole, x, bias, y, entry, n, m, M, N, R, WIDTH, PASSED, STACKED)
            tl.store(count + tile, 0)


def gathered(x: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x[:, order]`` + bias. Of many rows each is read at once, few are shared by several programs."""
    rows, inputs = x.shape[0], len(order)
    y = x.new_empty(rows, inputs)
    here = chip(x.device)
    block = 512 if rows <= MOST_ROWS else min(triton.next_power_of_2(inputs), 8192)
    grid = (rows, triton.cdiv(inputs, block))
    options = {} if interpreted() else {"num_warps": 4 if block <= 2048 else 8, "launch_pdl": here.overlaps}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        gathering[grid](x, order, bias, y, x.shape[1], inputs, here.overlaps, block, **options)
    return y


def product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    place: Tensor | None = None,
    rank: int = 0,
    passed: bool = False,
    stacked: bool = False,
    tile: Tiling | None = None,
    early: bool = False,
) -> Tensor:
    """``y = x w'`` + bias for x (rows, inputs), rows at most 64. All operands contiguous.

    ``passed``: ``y = x[:, :rank] + x[:, rank:] w'``. ``stacked``: x, of rank columns, stands beside the result,
    ``y = [x, x w'][:, place]``.
    """
    rows, width = x.shape
    outputs, inputs = w.shape[0] + (rank if stacked else 0), w.shape[1]
    y = x.new_empty(rows, outputs)
    if not y.numel():
        return y
    here = chip(x.device)
    tile = tile or tiling(rows, outputs, inputs, x.element_size(), here.processors)
    grid = (triton.cdiv(outputs, tile.n), tile.split)
    parts = count = None
    if tile.split > 1:
        parts = torch.empty(tile.split, rows, outputs, dtype=torch.float32, device=x.device)
        count = counters(x.device, grid[0])
    part = tile.part(inputs)
    early = early and part == tile.k
    rank = rank if passed or stacked else 0
    aligned = math.gcd(inputs, width, rank, 16)
    options = {} if interpreted() else {"num_warps": tile.warps, "launch_pdl": here.overlaps}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](
            x, w, bias, place, y, parts, count, rows, outputs, inputs // aligned, rank // aligned, width // aligned,
            aligned, part, tile.rows, tile.n, tile.k, tile.split, passed, stacked, here.overlaps, early,
            "ieee", tile.stages, **options,
        )  # fmt: skip
    return y
