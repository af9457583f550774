"""Measuring a kernel against the stock operators on a GPU, with events, on cold factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..base import Match

__all__ = ["timed"]

LAPS = 9
CACHES = 4
"""Copies of the factors fill the L2 cache so many times."""
Times = tuple[float, ...]


def timed(
    found: Match,
    factors: Mapping[str, Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    images: torch.memory_format,
    captured: bool,
) -> tuple[Times, Times]:
    """Seconds of a call of the kernel, and of the stock operators, in every lap over the copies of the factors."""
    own = {name: factors[name].detach() for name in found.factors}
    some = next(factor for factor in own.values() if factor.is_floating_point())
    size = sum(factor.nbytes for factor in own.values())
    cache = torch.cuda.get_device_properties(some.device).L2_cache_size
    number = CACHES * cache // max(size, 1 << 20) + 2
    copies = [{name: factor.clone() for name, factor in own.items()} for _ in range(number)]
    made = torch.Generator(some.device).manual_seed(0)
    x = torch.randn(tuple(shape), generator=made, device=some.device, dtype=some.dtype)
    x = x.contiguous(memory_format=images) if x.ndim == 4 else x

    def over(run: Callable[..., Tensor]) -> Callable[[], None]:
        def lap() -> None:
            for given in copies:
                run(x, given, bias)

        return lap

    taken: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), torch.cuda.device(some.device):
        laps = [over(run) for run in (found.run, found.reference)]
        for lap in laps:
            lap()
        if captured:
            laps = [_captured(lap) for lap in laps]
        for _ in range(2 + LAPS):
            for lap, times in zip(laps, taken, strict=True):
                times.append(_seconds(lap) / number)
    return tuple(taken[0][2:]), tuple(taken[1][2:])


def _captured(lap: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lap()
    return graph.replay


def _seconds(lap: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    lap()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3
