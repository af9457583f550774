"""A convolution between two pointwise ones, the intermediates not through device memory.

``b i p q, r i -> b r p q ; s r p q -> b s ; b s, o s -> b o``, activations with channels last. A program computes all
outputs of some positions: it slides over the first intermediate with all taps, keeps the second one in registers, and
multiplies it by tiles of the last factor. The first intermediate of the positions that it reads, it computes itself
(``whole``: for some rows of one image, into a piece of scratch memory that only it uses and that stays in the caches),
or reads from where another product has put it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import chip, interpreted

__all__ = ["Window2", "Windows", "bands", "constants", "kernel", "slide", "three", "windows"]


@dataclass(frozen=True)
class Window2:
    """Taps, steps and zeros before the input, over rows and columns."""

    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def positions(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the output."""
        sizes = zip((rows, columns), self.taps, self.stride, self.padding, strict=True)
        found = [(size + 2 * zeros - taps) // step + 1 for size, taps, step, zeros in sizes]
        return max(found[0], 0), max(found[1], 0)


@dataclass(frozen=True)
class Windows:
    """Tiling: ``p`` positions, ``o`` outputs and ``k`` channels at a time; the outputs in ``split`` parts, each by a
    program of its own, which repeats what comes before.
    """

    p: int = 64
    o: int = 64
    k: int = 32
    split: int = 1
    warps: int = 4
    stages: int = 3


@triton.jit
def _first(
    x: tensor, v: tensor, t: tensor, image: tensor, top: tensor, H: tensor, W: tensor,
    C: constexpr, R: constexpr, AREA: constexpr, BP: constexpr, BR: constexpr, BK: constexpr,
    PRECISION: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """t (AREA, R), from rows top, top + 1, ... of one image; those outside of it are left out."""
    r = tl.arange(0, BR)
    for start in range(0, AREA, BP):
        q = start + tl.arange(0, BP)
        row = top + q // W
        live = (q < AREA) & (row >= 0) & (row < H)
        at = (image * H + row).to(tl.int64) * W + q % W
        acc = tl.zeros([BP, BR], tl.float32)
        for c0 in tl.range(0, C, BK, num_stages=STAGES):
            c = c0 + tl.arange(0, BK)
            value = tl.load(x + at[:, None] * C + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
            factor = tl.load(v + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
            acc = tl.dot(value, factor.T, acc, input_precision=PRECISION)
        inside = live[:, None] & (r < R)[None, :]
        tl.store(t + q[:, None] * R + r[None, :], acc.to(t.dtype.element_ty), mask=inside)


@triton.jit
def _slide(
    t: tensor, core: tensor, origin: tensor, low: tensor, left: tensor, live: tensor, s: tensor,
    H: tensor, W: tensor, R: constexpr, S: constexpr, KH: constexpr, KW: constexpr,
    BP: constexpr, BS: constexpr, BT: constexpr, BK: constexpr,
    PRECISION: constexpr, STAGES: constexpr,
) -> tuple[tensor, tensor]:  # fmt: skip
    """(BP, BS) and (BP, BT), the channels from s on and BT more: the positions whose first taps lie at (low, left); t's
    entry (row, column) is ``origin + row W + column``.
    """
    one, two = tl.zeros([BP, BS], tl.float32), tl.zeros([BP, BT if BT else 16], tl.float32)
    chunks: tl.constexpr = (R + BK - 1) // BK
    for step in tl.range(0, KH * KW * chunks, num_stages=STAGES):
        tap = step // chunks
        r = (step % chunks) * BK + tl.arange(0, BK)
        row, column = low + tap // KW, left + tap % KW
        there = live & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        at = origin + row * W + column
        value = tl.load(t + at[:, None] * R + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0)
        factor = _taps(core, s, tap, r, R, S, KH * KW)
        one = tl.dot(value, factor.T, one, input_precision=PRECISION)
        if BT:
            more = _taps(core, BS + tl.arange(0, BT), tap, r, R, S, KH * KW)
            two = tl.dot(value, more.T, two, input_precision=PRECISION)
    return one, two


@triton.jit
def _taps(
    core: tensor, s: tensor, tap: tensor, r: tensor, R: constexpr, S: constexpr, TAPS: constexpr
) -> tensor:  # fmt: skip
    """(s, r) at one tap."""
    at = (s * TAPS + tap)[:, None] * R + r[None, :]
    return tl.load(core + at, mask=(s < S)[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def _put(
    y: tensor, result: tensor, bias: tensor, position: tensor, live: tensor, o: tensor, OUT: constexpr
) -> None:  # fmt: skip
    """Channels o of some positions."""
    inside = o < OUT
    if bias is not None:
        result += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[None, :]
    where = position[:, None] * OUT + o[None, :]
    tl.store(y + where, result.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def kernel(
    x: tensor, v: tensor, core: tensor, u: tensor, bias: tensor, t: tensor, y: tensor,
    N: tensor, H: tensor, W: tensor, OH: tensor, OW: tensor,
    LINES: constexpr, C: constexpr, R: constexpr, S: constexpr, OUT: constexpr, AREA: constexpr, PART: constexpr,
    KH: constexpr, KW: constexpr, SH: constexpr, SW: constexpr, PH: constexpr, PW: constexpr,
    WHOLE: constexpr, OVERLAPS: constexpr, BP: constexpr, BR: constexpr, BS: constexpr, BT: constexpr,
    BO: constexpr, BK: constexpr, PRECISION: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """y (N, OH, OW, O). x (N, H, W, C), v (R, C), core (S, KH, KW, R), u (O, S); t (N, H, W, R), if WHOLE scratch
    (programs, AREA, R), AREA entries of the input for LINES lines of the output each.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    program, part = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, BP)
    if WHOLE:
        many = tl.cdiv(OH, LINES)
        image, line = program // many, (program % many) * LINES
        line_p = line + p // OW
        column_p = p % OW
        live = (p < LINES * OW) & (line_p < OH)
        position = (image * OH + line_p).to(tl.int64) * OW + column_p
        top = line * SH - PH
        t += (program * tl.num_programs(1) + part).to(tl.int64) * (AREA * R)
        _first(x, v, t, image, top, H, W, C, R, AREA, BP, BR, BK, PRECISION, STAGES)
        tl.debug_barrier()
        origin = tl.full([BP], 0, tl.int64) - top * W
    else:
        position = program.to(tl.int64) * BP + p
        live = position < N * OH * OW
        image_p = position // (OH * OW)
        line_p = position % (OH * OW) // OW
        column_p = position % OW
        origin = image_p * H * W
    low, left = line_p * SH - PH, column_p * SW - PW
    s = tl.arange(0, BS)
    if u is None:
        s += part * BS
    one, two = _slide(t, core, origin, low, left, live, s, H, W, R, S, KH, KW, BP, BS, BT, BK, PRECISION, STAGES)
    if u is None:
        _put(y, one, bias, position, live, s, S)
    else:
        inner, more = one.to(x.dtype.element_ty), two.to(x.dtype.element_ty)
        for start in tl.range(0, PART, BO, num_stages=STAGES):
            o = part * PART + start + tl.arange(0, BO)
            result = tl.dot(inner, _taps(u, o, 0, s, S, OUT, 1).T, input_precision=PRECISION)
            if BT:
                rest = _taps(u, o, 0, BS + tl.arange(0, BT), S, OUT, 1)
                result = tl.dot(more, rest.T, result, input_precision=PRECISION)
            _put(y, result, bias, position, live, o, OUT)


def bands(columns: int, lines: int, p: int) -> int:
    """Lines of the output that a program of ``p`` positions takes, none where a line is longer than that."""
    return min(p // columns, lines) if columns else 0


def constants(
    size: tuple[int, int], channels: tuple[int, int, int, int], window: Window2, tile: Windows
) -> dict[str, Any]:
    """What the kernel is compiled for. ``size`` of the input, ``channels`` of x, both intermediates and y."""
    c, r, s, o = channels
    lines, columns = window.positions(*size)
    lines = bands(columns, lines, tile.p)
    names = ("KH", "KW", "SH", "SW", "PH", "PW")
    large, more = _parts(s)
    halo = (lines - 1) * window.stride[0] + window.taps[0]
    return dict(zip(names, (*window.taps, *window.stride, *window.padding), strict=True)) | {
        "C": c, "R": r, "S": s, "OUT": o, "LINES": lines, "AREA": halo * size[1],
        "PART": triton.cdiv(triton.cdiv(o, tile.split), tile.o) * tile.o,
        "BP": tile.p, "BR": max(16, triton.next_power_of_2(r)), "BS": large, "BT": more, "BO": tile.o, "BK": tile.k,
        "PRECISION": "ieee", "STAGES": tile.stages,
    }  # fmt: skip


def _parts(s: int) -> tuple[int, int]:
    """Powers of two, or none, that hold s channels with few to spare."""
    whole = max(16, triton.next_power_of_2(s))
    rest = max(16, triton.next_power_of_2(s - whole // 2))
    return (whole // 2, rest) if whole > 16 and rest < whole // 2 else (whole, 0)


def windows(
    x: Tensor,
    v: Tensor,
    core: Tensor,
    u: Tensor,
    bias: Tensor | None,
    window: Window2,
    tile: Windows,
    first: Tensor | None = None,
) -> Tensor:
    """(N, OH, OW, O) of x (N, H, W, C), v (R, C), core (S, KH, KW, R), u (O, S); ``first``: the first intermediate,
    (N, H, W, R), where it is known. All contiguous.
    """
    (n, h, w, c), r, (o, s) = x.shape, v.shape[0], u.shape
    fixed = constants((h, w), (c, r, s, o), window, tile)
    lines, columns = window.positions(h, w)
    y = x.new_empty(n, lines, columns, o)
    if y.numel():
        programs = triton.cdiv(n * lines * columns, tile.p)
        if first is None:
            programs = n * triton.cdiv(lines, fixed["LINES"])
        grid = (programs, triton.cdiv(o, fixed["PART"]))
        t = x.new_empty(grid[0] * grid[1] * fixed["AREA"] * r) if first is None else first
        _launch(grid, (x, v, core, u, bias, t, y), fixed | {"WHOLE": first is None}, tile)
    return y


def slide(x: Tensor, core: Tensor, bias: Tensor | None, window: Window2, tile: Windows) -> Tensor:
    """(N, OH, OW, S) of x (N, H, W, R) by core (S, KH, KW, R): the convolution by itself."""
    (n, h, w, r), s = x.shape, core.shape[0]
    lines, columns = window.positions(h, w)
    y = x.new_empty(n, lines, columns, s)
    if y.numel():
        grid = (triton.cdiv(n * lines * columns, tile.p), triton.cdiv(s, tile.o))
        fixed = constants((h, w), (r, r, s, s), window, tile) | {"WHOLE": False, "BS": tile.o, "BT": 0}
        _launch(grid, (x, None, core, None, bias, x, y), fixed, tile)
    return y


def _launch(grid: tuple[int, int], tensors: tuple[Tensor | None, ...], fixed: dict[str, Any], tile: Windows) -> None:
    x, y = tensors[0], tensors[-1]
    assert x is not None
    assert y is not None
    overlaps = chip(x.device).overlaps
    options = {} if interpreted() else {"num_warps": tile.warps, "launch_pdl": overlaps}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](*tensors, *x.shape[:3], *y.shape[1:3], **fixed, OVERLAPS=overlaps, **options)


def three(
    x: Tensor, first: Tensor, core: Tensor, last: Tensor, bias: Tensor | None, window: Window2, by: str
) -> Tensor:
    """(N, OH, OW, O) of x (N, H, W, C), first (R, C), core (S, KH, KW, R), last (O, S): in one launch (``whole``), with
    the first product by cuBLAS (``two``), or as three launches (``three``).
    """
    n, (oh, ow) = len(x), window.positions(*x.shape[1:3])
    if by == "three":
        one, small = Window2((1, 1), (1, 1), (0, 0)), Windows(16, 32, 128, 1, 4, 3)
        inner = slide(x, first[:, None, None], None, one, small)
        return slide(slide(inner, core, None, window, small), last[:, None, None], bias, one, small)
    many = n * oh * ow
    tile = Windows(128, 64, 32, 1, 8, 5) if many > 8192 else Windows(64 if many > 1024 else 32, 64, 64, 1, 4, 4)
    if by == "whole":
        if not bands(ow, oh, tile.p):
            raise ValueError(f"a line of {ow} positions is longer than {tile.p}")
        return windows(x, first, core, last, bias, window, tile)
    inner = (x.flatten(0, 2) @ first.T).unflatten(0, x.shape[:3])
    return windows(x, first, core, last, bias, window, tile, inner)
