"""What a kernel gains, by measurement against the stock operators on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Match

__all__ = ["GAIN", "Timed", "memory_format", "timed"]

GAIN = 1.05
"""A kernel is taken where it is faster than the stock operators by this factor, in least and in median time."""
REPEATS = 15
COLD = 64 << 20
"""Bytes of copies of the factors that a measurement goes through: more than caches hold, as in a whole model."""
LEAST, LONGEST = 5, 2.0
"""Repetitions at least, and seconds after which there are no more."""


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
    found: Match,
    factors: Mapping[str, Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    captured: bool = False,
    run: Callable[..., Tensor | None] | None = None,
    cold: int = COLD,
) -> Timed:
    """Times the kernel and the stock operators on an input of that shape; on a GPU as called from Python, or
    ``captured`` into a CUDA graph. ``run``: what runs the kernel, on the processor; where it gives None nothing is
    gained.

    Both run in turn on copies of the factors, of ``cold`` bytes together: with that of the whole model the weights are
    read from where the caches hold them there, or from memory.
    """
    if found.kernel.device == "cuda":
        from .triton import timing

        return Timed(*timing.timed(found, factors, bias, shape, memory_format("cuda"), captured))
    own = {name: factors[name].detach() for name in found.factors}
    size = sum(factor.numel() * factor.element_size() for factor in own.values())
    count = cold // max(size, 4096) + 2 if size < cold else 1
    copies = [own if count == 1 else {name: factor.clone() for name, factor in own.items()} for _ in range(count)]
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    both: tuple[tuple[Callable[..., Tensor | None], list[float]], ...] = ((found.reference, []), (run or found.run, []))
    end = time.perf_counter() + LONGEST
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for lap in range(2 + REPEATS):
            for place, (call, taken) in enumerate(both):
                given = copies[(lap + place * count // 2) % count]
                start = time.perf_counter()
                result = call(x, given, bias)
                taken.append(time.perf_counter() - start)
                if result is None:
                    return Timed((math.inf,), (1.0,))
            if lap > LEAST and time.perf_counter() > end:
                break
    stock, fast = (tuple(taken[2:]) for _, taken in both)
    return Timed(fast, stock)
