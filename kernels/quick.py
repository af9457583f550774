"""Calls of one layer's kernel whose operands were checked before: what is read again is kept short.

Between two calls of a large model what Python reads is gone from the caches, so each object that a call looks at costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layers import Accelerated

__all__ = ["PLAIN", "Quick", "watched"]

PLAIN = frozenset({Tensor, nn.Parameter})


class Quick:
    """``asked`` for one layer, after it ran the kernel on the tensors that the layer has at ``places``, a dict and its
    key for each operand behind the input. Called with an input it gives what ``asked`` gives, as long as the operands
    are the same tensors with the same memory; None where ``asked`` has to look again.
    """

    __slots__ = ("_call", "_inputs", "_kept", "_outputs", "_places", "_rows", "_threads")

    def __init__(self, asked: Accelerated, places: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        operands = [own[key] for own, key in places]
        prepare = asked.match.kernel.prepare
        assert prepare is not None
        self._call, self._inputs, self._outputs = prepare(*operands)
        self._places, self._rows, self._threads = tuple(places), asked.rows, asked.threads
        self._kept = tuple(None if t is None else (t, t.data_ptr(), t.shape, t.dtype) for t in operands)

    def __call__(self, x: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or watched() or torch.is_autocast_enabled("cpu"):
            return None
        gradients = torch.is_grad_enabled()
        if type(x) not in PLAIN or x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
            return None
        if x.is_neg() or x.is_nested or torch.get_num_threads() != self._threads or (gradients and x.requires_grad):
            return None
        for (own, key), kept in zip(self._places, self._kept, strict=True):
            t = own.get(key)
            if kept is None:
                if t is not None:
                    return None
            elif (
                t is not kept[0]
                or t.data_ptr() != kept[1]
                or t.shape != kept[2]
                or t.dtype is not kept[3]
                or not t.is_contiguous()
                or (gradients and t.requires_grad)
            ):
                return None
        shape = x.shape
        if not shape or shape[-1] != self._inputs:
            return None
        rows = x.numel() // self._inputs
        for span in self._rows:
            if rows in span:
                x = x if x.is_contiguous() else x.contiguous()
                y = x.new_empty((*shape[:-1], self._outputs))
                return None if self._call(x.data_ptr(), y.data_ptr(), rows, self._threads) else y
        return None


def watched() -> bool:
    """Whether something records or transforms the operators that run: a trace, a mode, a functorch transform, gradients
    that go forwards.

    These have no public question in torch; where it is not known, something does.
    """
    try:
        return bool(
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._ops._len_torch_dispatch_stack_pre_dispatch()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state()
            or torch.autograd.forward_ad._current_level >= 0
        )
    except AttributeError:
        return True
