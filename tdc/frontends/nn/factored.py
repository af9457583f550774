"""The module that takes the place of a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir import Block, Op

__all__ = ["FactoredLinear", "is_linear", "linear_weight", "place", "stored_orientation"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` (and subclasses with its forward) and for the transposed ``Conv1D`` of transformers."""
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "parametrizations"):
        return False
    if not isinstance(module._parameters.get("weight"), Tensor):
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_weight(module: nn.Module, stored: Tensor) -> Tensor:
    """The weight in canonical axes (o, i): a view of the stored one."""
    return stored.T if _is_conv1d(module) else stored


def stored_orientation(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of :func:`linear_weight`."""
    return linear_weight(module, weight)


class FactoredLinear(nn.Module):
    """``y = W x + b`` with W never formed: ``block`` runs on the factors.

    Input (..., i), output (..., o). The factors are parameters ``weight_<name>`` and can be trained; index factors are
    buffers. Hooks of the replaced module are carried over. Source of the form: see the decomposition.
    """

    bias: Tensor | None

    def __init__(self, replaced: nn.Module, block: Block, factors: Mapping[str, Tensor], decomposition: str) -> None:
        super().__init__()
        self.block = block
        self.decomposition = decomposition
        sizes = dict(block.sizes)
        self.in_features, self.out_features = sizes["i"], sizes["o"]
        for name, factor in factors.items():
            if isinstance(factor, nn.Parameter) or factor.is_floating_point():
                parameter = factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor)
                self.register_parameter(f"weight_{name}", parameter)
            else:
                self.register_buffer(f"weight_{name}", factor)
        self.register_parameter("bias", replaced._parameters.get("bias"))
        self.training = replaced.training
        for name in (*_HOOKS, *_HOOK_FLAGS):
            if name in replaced.__dict__:
                self.__dict__[name] = replaced.__dict__[name]
        self.__dict__["_skeleton"] = _skeleton(replaced)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name, as the layout of the plan names them."""
        return {name: getattr(self, f"weight_{name}") for name, _ in self.block.factors}

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for, in the replaced module's orientation. Formed at every access."""
        some = next(factor for factor in self.factors.values() if factor.is_floating_point())
        eye = torch.eye(self.in_features, dtype=some.dtype, device=some.device)
        return stored_orientation(self.__dict__["_skeleton"], self._run(eye, None).T)

    def reorder_bias(self, order: Tensor) -> None:
        """Put the bias in the order in which the block gives its output (a gather folded into the next layer)."""
        if self.bias is not None:
            reordered = self.bias.detach()[order.to(self.bias.device)].clone()
            self.bias = nn.Parameter(reordered, requires_grad=self.bias.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, self.bias)

    def _run(self, activation: Tensor, bias: Tensor | None) -> Tensor:
        block = self.block
        values = {block.input: activation}
        for op in block.ops:
            last = bias if op.output == block.output else None
            values[op.output] = _EMIT[op.kind](self, op, values, last)
        result = values[block.output]
        return result if bias is None or block.ops[-1].kind == "matmul" else result + bias

    def dense(self) -> nn.Module:
        """A module of the replaced class with the dense weight that the factors stand for."""
        module = copy.copy(self.__dict__["_skeleton"])
        module._parameters = dict(module._parameters)
        with torch.no_grad():
            module._parameters["weight"] = nn.Parameter(self.weight.contiguous())
        module._parameters["bias"] = self.bias
        module.training = self.training
        for name in (*_HOOKS, *_HOOK_FLAGS):
            if name in self.__dict__:
                module.__dict__[name] = self.__dict__[name]
        return module

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{axis}={size}" for axis, size in self.block.sizes if axis not in "oi")
        return f"{self.in_features}, {self.out_features}, {self.decomposition}, {ranks}, bias={self.bias is not None}"


def place(model: nn.Module, swaps: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules at their paths. The fused evaluation path of torch's own encoder layers is switched off where a
    part of them is replaced: it reads the dense weights, which would be formed at every call.
    """
    for path, module in swaps:
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, child, module)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0


def _skeleton(module: nn.Module) -> nn.Module:
    """The module without its weight and bias: what is needed to build one of its class again."""
    bare = copy.copy(module)
    bare._parameters = dict.fromkeys(module._parameters)
    return bare


def _matmul(module: FactoredLinear, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    activation, factor = values[op.inputs[0]], getattr(module, f"weight_{op.inputs[1]}")
    return functional.linear(activation, factor, bias)


def _take(module: FactoredLinear, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    index = getattr(module, f"weight_{op.inputs[1]}")
    return values[op.inputs[0]].index_select(-1, index[op.start : op.stop])


def _concat(module: FactoredLinear, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return torch.cat([values[name] for name in op.inputs], -1)


def _add(module: FactoredLinear, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return values[op.inputs[0]] + values[op.inputs[1]]


_EMIT: dict[str, Any] = {"matmul": _matmul, "take": _take, "concat": _concat, "add": _add}
