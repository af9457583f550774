"""Counting multiply-adds while a module runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["MacCounter"]


class MacCounter(TorchDispatchMode):
    """``macs``: half the floating operations by torch's own formulas, of all operators that run inside.

    ``FlopCounterMode`` does the same and also follows the modules, for which it wants a gradient function of every
    argument that requires a gradient: it fails where a module is called on a parameter under ``no_grad`` (DeBERTa).
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is None and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=result) / 2
        return result
