"""Registering operators of torch: with implementations by device, fake tensors, gradients and vmap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Operator"]

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Operator:
    """``torch.ops.tdc.<name>``, registered when it is first asked for.

    ``schema`` as torch writes it; ``devices``: dispatch key -> implementation; ``reference`` serves all others;
    ``backward`` with ``setup``: see ``torch.library.register_autograd``; ``mapped``: see ``register_vmap``.
    """

    name: str
    schema: str
    devices: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any]
    setup: Callable[..., Any]
    mapped: Callable[..., Any] | None = None
    _made: list[torch.library.Library] = field(default_factory=list, repr=False)

    def __call__(self) -> Any:
        with _LOCK:
            if not self._made:
                self._made.append(self._register())
        return getattr(torch.ops.tdc, self.name).default

    def _register(self) -> torch.library.Library:
        made = torch.library.Library("tdc", "FRAGMENT")
        made.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key, implementation in self.devices.items():
            made.impl(self.name, implementation, key)
        made.impl(self.name, self.reference, "CompositeExplicitAutograd")
        name = f"tdc::{self.name}"
        torch.library.register_fake(name, self.fake, lib=made)
        torch.library.register_autograd(name, self.backward, setup_context=self.setup, lib=made)
        if self.mapped is not None:
            torch.library.register_vmap(name, self.mapped, lib=made)
        return made
