"""Kernels in graphs of torch.fx: operators of torch in place of blocks, where these are measured to be faster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdc.ir import Block

from .base import Match
from .measure import COLD, memory_format, timed
from .registry import match

__all__ = ["GraphKernels"]

_GAIN = 1.2
"""An operator must be that much faster by itself: compilers may make stock operators faster than they are alone."""
_STEP = 32
"""Sizes that round up to the same multiple are taken to be alike."""


@dataclass(frozen=True, eq=False)
class GraphKernels:
    """Gives the operator that runs a block faster than the stock operators do, called through torch, on the processor;
    what is alike is measured once. ``convolutions``: those too. Inductor lays out images and packs weights for its own,
    which are faster than they are alone. ``cold``: bytes of the weights of the graph, see :func:`.measure.timed`.
    """

    convolutions: bool = True
    cold: int = COLD
    _known: dict[Any, float] = field(default_factory=dict)

    def __call__(self, block: Block, factors: Mapping[str, Tensor], bias: Tensor | None, value: Tensor) -> Match | None:
        """``value``: what the block is given, perhaps a fake tensor; the lengths that it has now count where these can
        change.
        """
        found = match(block)
        if not isinstance(found, Match) or not found.kernel.registered:
            return None
        if block.kind.is_conv and not self.convolutions:
            return None
        own = [factors[name] for name in found.factors]
        floats = {t.dtype for t in (value, *own) if t.is_floating_point()}
        if floats != {torch.float32} or not all(t.device.type == "cpu" for t in (value, *own)):
            return None
        shape = _lengths(value)
        if block.kind.is_conv and (len(shape) != 4 or not value.is_contiguous(memory_format=memory_format("cpu"))):
            return None
        if not shape or not math.prod(shape):
            return None
        inputs = dict(block.sizes)["i"]  # there may be fewer hidden units than in the graph before
        given = (shape[0], inputs, *shape[2:]) if block.kind.is_conv else (math.prod(shape[:-1]), inputs)
        sizes = tuple((axis, -(-size // _STEP)) for axis, size in found.sizes)
        key = (found.kernel.name, sizes, found.windows, bias is None, given, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = timed(found, factors, bias, given, run=found, cold=min(self.cold, COLD)).gain
        return found if self._known[key] > _GAIN else None


def _lengths(value: Tensor) -> tuple[int, ...]:
    """Of those that can change what they are now; none where that is not known."""
    lengths = [n if isinstance(n, int) else n.node.hint for n in value.shape]
    return tuple(lengths) if all(isinstance(n, int) for n in lengths) else ()
