"""Layers that read the same input and share factors: what follows from these and the input is computed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...ir import Block, Op

__all__ = ["Sharing", "own_part", "shared_part"]

Values = Mapping[str, Tensor]


class Sharing:
    """What the layers of one group have in common. ``shared``: names of the factors that the first one, the ``lead``,
    holds for all.

    The first layer that is called with an input leaves what it has computed; the others take it, each once, as long as
    the input is the same tensor, unchanged, in the same mode, and the factors are. It is dropped once each of them has
    had it, or one asks again (changes of inference tensors, and of memory that is numpy's, cannot be seen), or
    gradients have run through it. While a compiler traces, each computes it by itself: compilers merge what is equal.
    """

    lead: nn.Module

    def __init__(self, shared: frozenset[str]) -> None:
        self.shared = shared
        self.count = 0
        self._kept: tuple[Any, ...] | None = None
        self._common: dict[tuple[Op, ...], tuple[Op, ...]] = {}

    def join(self, layer: nn.Module) -> None:
        if self.count == 0:
            self.lead = layer
        self.count += 1

    def common(self, ops: tuple[Op, ...], entry: str) -> tuple[Op, ...]:
        """The ops that need nothing but the input and the shared factors."""
        if ops not in self._common:
            known, found = {entry, *self.shared}, []
            for op in ops:
                if known.issuperset(op.inputs):
                    known.add(op.output)
                    found.append(op)
            self._common[ops] = tuple(found)
        return self._common[ops]

    def values(self, layer: nn.Module, given: Tensor, make: Callable[[], Values]) -> Values:
        """What ``make`` gives for this input; what it gave to another layer where that is still true."""
        if torch.compiler.is_compiling() or not isinstance(given, Tensor):
            return make()
        state, kept = self._state(given), self._kept
        if kept is not None and kept[0]() is given and kept[1] == state and id(layer) not in kept[3]:
            values: Values = kept[2]
            self._kept = (*kept[:3], {*kept[3], id(layer)}) if len(kept[3]) + 1 < self.count else None
            return values
        made = make()
        self._kept = (weakref.ref(given), state, made, {id(layer)}) if self.count > 1 else None
        if torch.is_grad_enabled() and self._kept is not None:
            for value in made.values():
                if value.requires_grad and value is not given:
                    value.register_hook(self._drop)
        return made

    def _drop(self, gradient: Tensor) -> None:
        """The graph behind the values may be gone now."""
        self._kept = None

    def _state(self, given: Tensor) -> tuple[Any, ...]:
        factors = [getattr(self.lead, f"weight_{name}") for name in sorted(self.shared)]
        tensors = [(id(t), -1 if t.is_inference() else t._version) for t in (given, *factors)]
        device = given.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts else None
        return (*tensors, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def own_part(block: Block, alike: tuple[Op, ...]) -> Block:
    """The block without the ops that are alike: its input is what they give."""
    if not alike:
        return block
    return _part(block, tuple(op for op in block.ops if op not in alike), alike[-1].output, block.output)


def shared_part(block: Block, alike: tuple[Op, ...]) -> Block | None:
    """The ops that are alike, None where they are none or give several values to the others."""
    others = {name for op in block.ops if op not in alike for name in op.inputs}
    if not alike or others & {op.output for op in alike[:-1]}:
        return None
    return _part(block, alike, block.input, alike[-1].output)


def _part(block: Block, ops: tuple[Op, ...], entry: str, output: str) -> Block:
    factors = tuple(pair for pair in block.factors if any(pair[0] in op.inputs for op in ops))
    return replace(block, factors=factors, ops=ops, input=entry, output=output)
