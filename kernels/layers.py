"""Kernels for the layers of a model, each where it is measured to be faster than the stock operators."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tdc.ir import Block, Decline, Remark

from .base import Match
from .registry import match

__all__ = ["Accelerated", "Runs", "accelerate", "measured"]

STAGE = "kernels"
GAIN = 1.05
"""A kernel is taken where it is faster than the stock operators by this factor, in least and in median time."""
REPEATS = 15
COLD = 64 << 20
"""Bytes of copies of the factors that a measurement goes through: more than caches hold, as in a whole model."""


@runtime_checkable
class Runs(Protocol):
    """A layer that runs a block, and that can be told another way to run it."""

    bias: Tensor | None

    @property
    def own(self) -> Block:
        """The block that it computes by itself, with nobody else."""
        ...

    @property
    def factors(self) -> Mapping[str, Tensor]: ...

    def use(self, run: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor | None] | None) -> None:
        """Ask ``run(input, factors, bias)`` first for that block, and run it where it gives None."""
        ...


@dataclass(frozen=True)
class Accelerated:
    """Runs a block by its kernel where that was measured to be faster, gives None elsewhere.

    ``rows``: ranges of the number of rows, ``threads``: of torch, for which it was. Elsewhere: where gradients are
    needed, while a compiler traces, under autocast, for another dtype or device than float32 on the processor.
    """

    match: Match
    rows: tuple[range, ...]
    threads: int

    def __call__(self, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling() or _watched() or torch.is_autocast_enabled("cpu"):
            return None
        operands = (x, *factors.values()) if bias is None else (x, *factors.values(), bias)
        if not _suits(operands) or x.is_neg() or (torch.is_grad_enabled() and any(t.requires_grad for t in operands)):
            return None
        rows = x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 0
        if torch.get_num_threads() != self.threads or not any(rows in span for span in self.rows):
            return None
        result: Tensor = self.match.run(x, factors, bias)
        return result


def accelerate(model: nn.Module, rows: Iterable[int] = (1, 4, 16)) -> tuple[Remark, ...]:
    """Let the factored layers of ``model`` run on kernels, each for the numbers of rows at which its kernel is measured
    to be faster here and now, with torch's present number of threads; all else runs as before.

    ``rows``: those that are measured; each stands for those between the one before and itself. Layers of one shape are
    measured once. Returns a remark for each layer: what was measured, or why it stays. Results are within rounding of
    the stock operators'; since the choice is measured, two runs can differ by that. The model is changed in place;
    kernels are not saved with it, and ``accelerate(model, ())`` takes them away.
    """
    steps = sorted({int(n) for n in rows})
    known: dict[Any, list[float]] = {}
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Runs)]
    return tuple(Remark(name, STAGE, _accelerated(layer, steps, known)) for name, layer in layers)


def _accelerated(layer: Runs, steps: list[int], known: dict[Any, list[float]]) -> str:
    layer.use(None)
    found, factors = match(layer.own), layer.factors
    if isinstance(found, Decline):
        return found.reason
    if not _suits(factors[name] for name in found.factors):
        return f"{found.kernel.name}: {found.kernel.limits}"
    key = (found.kernel.name, found.sizes, layer.bias is None)
    if key not in known:
        known[key] = [measured(found, factors, layer.bias, n) for n in steps]
    starts, gains = [1, *(n + 1 for n in steps)], known[key]
    spans = [range(start, n + 1) for start, n, gain in zip(starts, steps, gains, strict=False) if gain > GAIN]
    text = ", ".join(f"{gain:.2f} times as fast at {n} rows" for n, gain in zip(steps, gains, strict=True))
    if not spans:
        return f"{found.kernel.name}: not used, {text or 'nothing measured'}"
    layer.use(Accelerated(found, tuple(spans), torch.get_num_threads()))
    return f"{found.kernel.name}: {text}"


def measured(found: Match, factors: Mapping[str, Tensor], bias: Tensor | None, rows: int) -> float:
    """How many times as fast as the stock operators the kernel is, the lesser one of least and median time.

    Both run in turn on copies of the factors, so that the weights are read from memory, as in a model that is larger
    than the cache.
    """
    own = {name: factors[name].detach() for name in found.factors}
    size = sum(factor.numel() * factor.element_size() for factor in own.values())
    copies = [{name: factor.clone() for name, factor in own.items()} for _ in range(COLD // max(size, 4096) + 2)]
    x = torch.randn(rows, dict(found.sizes)["i"], generator=torch.Generator().manual_seed(0))
    times: dict[Callable[..., Tensor], list[float]] = {found.reference: [], found.run: []}
    with torch.no_grad():
        for lap in range(2 + REPEATS):
            for place, (run, taken) in enumerate(times.items()):
                given = copies[(lap + place * len(copies) // 2) % len(copies)]
                start = time.perf_counter()
                run(x, given, bias)
                taken.append(time.perf_counter() - start)
    stock, fast = (taken[2:] for taken in times.values())
    return min(min(stock) / min(fast), statistics.median(stock) / statistics.median(fast))


def _suits(operands: Iterable[Tensor]) -> bool:
    """Whether all are plain tensors on the processor, float32 or int32."""
    for t in operands:
        if type(t) not in (Tensor, nn.Parameter) or not t.is_cpu or t.dtype not in (torch.float32, torch.int32):
            return False
    return True


def _watched() -> bool:
    """Whether something records or transforms the operators that run: a trace, a dispatch mode, a functorch transform.

    These have no public question in torch; where it is not known, something does.
    """
    try:
        return bool(
            torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state()
        )
    except AttributeError:
        return True
