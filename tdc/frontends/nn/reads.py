"""What sites read in a forward run, and the gradients of their outputs in the run backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...ir import Site
from .layers import padded

__all__ = ["Reads", "marking"]

_BYTES = 1 << 30


class Reads:
    """The inputs of modules, in the order of their calls: all of them, or none where they take more than a gigabyte or
    one was written to afterwards (so that it is no longer what the module has read).
    """

    def __init__(self, of_module: Mapping[nn.Module, Site]) -> None:
        self.of_module = of_module
        self._met: deque[tuple[nn.Module, Tensor, int]] = deque()
        self._sizes: dict[int, int] = {}
        self._open = True

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward call."""
        if not self._open:
            return
        given = args[0] if args else kwargs["input"]
        if given.is_inference():
            return self.drop()
        self._sizes[given.untyped_storage().data_ptr()] = given.untyped_storage().nbytes()
        if sum(self._sizes.values()) > _BYTES:
            return self.drop()
        self._met.append((module, given, given._version))  # the very tensor: who shares it is seen by that

    def drop(self) -> None:
        self._open = False
        self._met.clear()

    def hand(self, read: Callable[[Site, Tensor], None]) -> None:
        """Hand all of them on, and let go of each: who reads them may count on that where there are many."""
        if any(given._version != version for _, given, version in self._met):
            self.drop()
        with torch.no_grad():
            while self._met:
                module, given, _ = self._met.popleft()
                read(self.of_module[module], padded(module, given))
                del given


def marking(of_module: Mapping[nn.Module, Site], tap: Callable[[Site, Tensor], None]) -> Callable[..., Tensor | None]:
    """A forward hook that has the gradient of each module's output handed to ``tap``."""
    zero = torch.zeros((), requires_grad=True)

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        marked = output if output.requires_grad else output + zero.to(output)
        marked.register_hook(lambda gradient: tap(of_module[module], gradient))
        return marked

    return hook
