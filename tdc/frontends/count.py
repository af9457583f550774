"""Counting multiply-adds, and the bytes of activations, while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counter"]


class Counter(TorchDispatchMode):
    """``macs``: half the floating operations by torch's own formulas, of all operators that run inside. ``peak``: the
    most bytes at a time of tensors that the operators made and that are still referred to.

    ``FlopCounterMode`` counts the same operations and also follows the modules, for which it wants a gradient function
    of every argument that requires a gradient: it fails where a module is called on a parameter under ``no_grad``
    (DeBERTa).
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # late: it loads triton, where that is installed

        super().__init__()
        self._formulas = flop_registry
        self.macs = 0.0
        self.peak = 0
        self._live: dict[int, tuple[int, int]] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        formula = self._formulas.get(getattr(func, "_overloadpacket", None))
        if formula is None and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=result) / 2
        given = {_memory(leaf)[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        self.peak = max(self.peak, self._bytes)
        return result

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        """Count a tensor's memory until the last tensor on it is gone; memory that came in from outside is not."""
        place, size = _memory(tensor)
        if place not in self._live and (place in given or not size):
            return
        count, size = self._live.get(place, (0, size))
        self._bytes += size if count == 0 else 0
        self._live[place] = (count + 1, size)
        weakref.finalize(tensor, self._gone, place)

    def _gone(self, place: int) -> None:
        count, size = self._live.get(place, (0, 0))
        if count > 1:
            self._live[place] = (count - 1, size)
        elif count == 1:
            self._bytes -= self._live.pop(place)[1]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage; (0, 0) for one that has none."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return 0, 0
