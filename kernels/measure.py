"""What a kernel gains, by measurement against the stock operators on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdc.ir import Block, Decline

from .base import Match
from .registry import match

__all__ = ["GAIN", "Choice", "Timed", "choose", "memory_format", "timed"]

GAIN = 1.05
"""A kernel is taken where it is faster than the stock operators by this factor, in least and in median time."""
REPEATS = 15
COLD = 64 << 20
"""Bytes of copies of the factors that a measurement goes through: more than caches hold, as in a whole model."""


@dataclass(frozen=True)
class Timed:
    """Seconds of every repetition."""

    kernel: tuple[float, ...]
    stock: tuple[float, ...]

    @property
    def gain(self) -> float:
        """How many times as fast the kernel is, the lesser one of least and median time."""
        middle = statistics.median
        return min(min(self.stock) / min(self.kernel), middle(self.stock) / middle(self.kernel))


def memory_format(device: str) -> torch.memory_format:
    """That of the images that kernels for convolutions take there."""
    return torch.contiguous_format if device == "cpu" else torch.channels_last


def timed(
    found: Match, factors: Mapping[str, Tensor], bias: Tensor | None, shape: Sequence[int], captured: bool = False
) -> Timed:
    """Times the kernel and the stock operators on an input of that shape; on a GPU as called from Python, or
    ``captured`` into a CUDA graph.

    Both run in turn on copies of the factors, so that the weights are read from memory, as in a model that is larger
    than the cache.
    """
    if found.kernel.device == "cuda":
        from .triton import timing

        return Timed(*timing.timed(found, factors, bias, shape, memory_format("cuda"), captured))
    own = {name: factors[name].detach() for name in found.factors}
    size = sum(factor.numel() * factor.element_size() for factor in own.values())
    copies = [{name: factor.clone() for name, factor in own.items()} for _ in range(COLD // max(size, 4096) + 2)]
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    times: dict[Callable[..., Tensor], list[float]] = {found.reference: [], found.run: []}
    with torch.no_grad():
        for lap in range(2 + REPEATS):
            for place, (run, taken) in enumerate(times.items()):
                given = copies[(lap + place * len(copies) // 2) % len(copies)]
                start = time.perf_counter()
                run(x, given, bias)
                taken.append(time.perf_counter() - start)
    stock, fast = (tuple(taken[2:]) for taken in times.values())
    return Timed(fast, stock)


@dataclass(frozen=True)
class Choice:
    """A kernel for a block, and its median seconds at each of the shapes beside those of the stock operators."""

    match: Match
    kernel: tuple[float, ...]
    stock: tuple[float, ...]
    faster: tuple[bool, ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """What the block takes where the kernel runs at the shapes at which it is faster."""
        return tuple(k if fast else s for k, s, fast in zip(self.kernel, self.stock, self.faster, strict=True))


def choose(block: Block, bias: bool, shapes: Iterable[Sequence[int]]) -> Choice | Decline:
    """The kernel that :func:`tdc.kernels.accelerate` would choose for a layer with that block and inputs of these
    shapes, on random factors, with torch's present number of threads. Declines where no kernel runs the block or none
    of the shapes gains by it.
    """
    found = match(block)
    if isinstance(found, Decline):
        return found
    made = torch.Generator().manual_seed(0)
    index = {op.inputs[1] for op in block.ops if op.kind == "take"}
    factors = {
        name: torch.randperm(shape[0], generator=made).int() if name in index else torch.randn(shape, generator=made)
        for name, shape in block.factors
    }
    last = dict(block.sizes)
    some_bias = torch.randn(last.get("g", 1) * last["o"], generator=made) if bias else None
    times = [timed(found, factors, some_bias, shape) for shape in shapes]
    faster = tuple(one.gain > GAIN for one in times)
    if not any(faster):
        gains = ", ".join(f"{one.gain:.2f}" for one in times)
        return Decline(f"{found.kernel.name}: {gains or 'nothing measured'} times as fast as stock operators")
    kernel, stock = ([statistics.median(getattr(one, who)) for one in times] for who in ("kernel", "stock"))
    return Choice(found, tuple(kernel), tuple(stock), faster)
