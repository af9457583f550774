"""How long the layers of a module take on this machine, as they are and as blocks."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...ir import Block, Site
from ..clock import Run, copies_of, in_turn, once, seconds_of, stand_ins, stored_numbers
from ..program import Kernel
from .batches import Call
from .factored import factored
from .running import evaluation

__all__ = ["Stopwatch", "times"]

_RUNS = 9
_GAIN = 1.05
"""A kernel is counted where it is faster than the stock operators by this factor."""


@dataclass(frozen=True)
class Stopwatch:
    """Times a model, and single layers on activations of the shapes that they meet in it.

    ``whole`` runs the model, inside ``context``. ``layers``: ``site.order`` -> the module, and one activation for each
    of its uses in a run.
    """

    whole: Run
    context: Callable[[], AbstractContextManager[None]]
    layers: Mapping[int, tuple[nn.Module, Sequence[Tensor]]]

    @property
    def _bytes(self) -> int:
        modules = {module for module, _ in self.layers.values()}
        return sum(weight.nbytes for m in modules if (weight := m._parameters["weight"]) is not None)

    def model(self) -> tuple[float, float]:
        """Seconds of a run of the whole model, the fastest, and what part of a run is spent in the layers: both are
        timed in the same runs, so that other work on the machine changes it little.
        """
        inside, shares, taken, since = 0.0, list[float](), list[float](), 0.0

        def enter(module: nn.Module, args: object) -> None:
            nonlocal since
            since = time.perf_counter()

        def leave(module: nn.Module, args: object, output: object) -> None:
            nonlocal inside
            inside += time.perf_counter() - since

        modules = {module for module, _ in self.layers.values()}
        handles = [m.register_forward_pre_hook(enter) for m in modules]
        handles += [m.register_forward_hook(leave) for m in modules]
        try:
            with self.context():
                for lap in range(_RUNS + 1):
                    inside = 0.0
                    whole = once(self.whole)
                    if lap:
                        taken.append(whole)
                        shares.append(inside / whole)
        finally:
            for handle in handles:
                handle.remove()
        return min(taken), statistics.median(shares)

    def key(self, site: Site) -> object:
        """Equal for sites that take the same time."""
        shapes = tuple((tuple(x.shape), x.stride(), x.dtype) for x in self.layers[site.order][1])
        return (site.kind, site.sizes, site.attributes, site.dtype, site.layout, site.bias, shapes)

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[Kernel | None] = ()) -> list[float]:
        """Seconds that a site takes in a run, as it is and in place of it with each of the blocks, by stock operators
        or by its kernel, where that is faster beyond doubt.
        """
        module, activations = self.layers[site.order]
        plain = all(x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() for x in activations)
        usable = [kernel if plain else None for kernel in kernels or [None] * len(blocks)]
        whole = self._bytes
        copies = [_dense(module, whole), *(_replaced(module, block, whole) for block in blocks)]
        places = [k for k, kernel in enumerate(usable) if kernel is not None]
        copies += [_replaced(module, blocks[k], whole, usable[k]) for k in places]
        inputs = [None, *blocks, *(blocks[k] for k in places)]
        entering = [[_entering(block, x) for x in activations] for block in inputs]
        seconds = seconds_of(
            [[_run(layer, met) for layer in layers] for layers, met in zip(copies, entering, strict=True)]
        )
        found, faster = seconds[: 1 + len(blocks)], seconds[1 + len(blocks) :]
        for k, own in zip(places, faster, strict=True):
            if found[1 + k] > _GAIN * own:
                found[1 + k] = own
        return found


def _entering(block: Block | None, activation: Tensor) -> Tensor:
    """As much of the activation as the block reads, which may know fewer hidden units."""
    if block is None or block.kind.is_conv:
        return activation
    width = dict(block.sizes)["i"]
    return activation if width == activation.shape[-1] else activation[..., :width].contiguous()


def _run(layer: nn.Module, activations: Sequence[Tensor]) -> Run:
    return in_turn([partial(layer, activation) for activation in activations])


def _like(weight: Tensor, seed: int) -> Tensor:
    made = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(weight).copy_(made)


def _dense(module: nn.Module, whole: int) -> list[nn.Module]:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    count = copies_of(weight.nbytes, whole)
    return [_bare(module, _like(weight, seed), bias) for seed in range(count)]


def _bare(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module with another weight and none of its hooks."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    made._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        made.__dict__[name] = {}
    return made.eval()


def _replaced(module: nn.Module, block: Block, whole: int, kernel: Kernel | None = None) -> list[nn.Module]:
    like = module._parameters["weight"]
    assert like is not None
    bare = _bare(module, like, module._parameters.get("bias"))
    count = copies_of(stored_numbers(block) * like.element_size(), whole)
    return [_with_block(bare, block, like, seed, kernel) for seed in range(count)]


def _with_block(bare: nn.Module, block: Block, like: Tensor, seed: int, kernel: Kernel | None) -> nn.Module:
    factors = stand_ins(block, like.dtype, like.device, seed)
    bias = bare._parameters.get("bias")
    if bias is not None and not block.kind.is_conv:
        bias = nn.Parameter(bias.detach()[: dict(block.sizes)["o"]], requires_grad=False)
    made = factored(bare, block, factors, "", bias).eval()
    made.use(kernel)
    return made


def times(model: nn.Module, small: nn.Module, call: Call) -> tuple[float, float]:
    """Seconds of a call of two models of one class, measured in turn."""
    args, kwargs = call
    with evaluation(model, timed=True, fused=True), evaluation(small, timed=True, fused=True):
        old, new = seconds_of([[lambda: model(*args, **kwargs)], [lambda: small(*args, **kwargs)]])
    return old, new
