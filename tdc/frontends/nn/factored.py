"""The modules that take the place of linear and convolution layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir import Block, Op, Rebuild, Window, contraction, conv_groups, conv_shape
from ..graph import built, memory_format
from .layers import held, padded, quicker, stored_weight
from .pointwise import COLUMNS, ROWS, whole_columns, whole_rows, without_gathers
from .sharing import Sharing, own_part, shared_part

__all__ = ["Factored", "FactoredConv", "FactoredLinear", "factored"]

Runner = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor | None]

_HOOKS = [f"_{name}{kind}" for name in ("forward", "backward", "state_dict") for kind in ("_hooks", "_pre_hooks")]
_HOOK_FLAGS = ["_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"]
_HOOK_FLAGS += ["_is_full_backward_hook"]
_RUNNERS = ("_runner", "_shared_runner")
_SIZES = {"in_features": "i", "nx": "i", "out_features": "o", "nf": "o"}
"""What linear layers call the sizes of their axes."""


class Factored(nn.Module):
    """A layer whose weight is never formed: ``block`` runs on the factors.

    The factors are parameters ``weight_<name>`` and can be trained; index factors are buffers. Hooks and attributes of
    the replaced module are carried over. Source of the form: see the decomposition. Layers that read the same input can
    share factors, which one of them, the lead, holds; see :mod:`.sharing`.
    """

    bias: Tensor | None

    def __init__(
        self,
        replaced: nn.Module,
        block: Block,
        factors: Mapping[str, Tensor],
        decomposition: str,
        bias: Tensor | None,
        sharing: Sharing | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.decomposition = decomposition
        self.__dict__["_sharing"] = sharing
        if sharing is not None:
            sharing.join(self)
        for name, factor in factors.items():
            if self.holder(name) is not self:
                continue
            if isinstance(factor, nn.Parameter) or factor.is_floating_point():
                parameter = factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor)
                self.register_parameter(f"weight_{name}", parameter)
            else:
                self.register_buffer(f"weight_{name}", factor)
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        self.training = replaced.training
        for name in (*_HOOKS, *_HOOK_FLAGS):
            if name in replaced.__dict__:
                self.__dict__[name] = replaced.__dict__[name]
        skeleton = self.__dict__["_skeleton"] = _skeleton(replaced)
        self.__dict__.update({key: value for key, value in _attributes(skeleton).items() if not hasattr(self, key)})

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name, as the layout of the plan names them."""
        return {name: self.factor(name) for name, _ in self.block.factors}

    def holder(self, name: str) -> nn.Module:
        """The layer that holds a factor: this one, or the lead of those that share it."""
        sharing: Sharing | None = self.__dict__["_sharing"]
        return sharing.lead if sharing is not None and name in sharing.shared else self

    def factor(self, name: str) -> Tensor:
        """One factor."""
        return held(self.holder(name), f"weight_{name}")

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for, in the replaced module's orientation. Formed at every access."""
        return stored_weight(self.__dict__["_skeleton"], self._impulses())

    def _impulses(self) -> Tensor:
        """The canonical weight, as the answer of the block to unit inputs."""
        raise NotImplementedError

    def _zeros(self, *shape: int) -> Tensor:
        some = next(factor for factor in self.factors.values() if factor.is_floating_point())
        return torch.zeros(shape, dtype=some.dtype, device=some.device)

    def reorder_bias(self, order: Tensor) -> None:
        """Put the bias in the order in which the block gives its output (a gather folded into the next layer)."""
        if self.bias is not None:
            reordered = self.bias.detach()[order.to(self.bias.device)].clone()
            self.bias = nn.Parameter(reordered, requires_grad=self.bias.requires_grad)

    @property
    def own(self) -> Block:
        """The block, without what the layers that share factors compute alike: its input is what that gives."""
        return own_part(self.block, self._alike())

    @property
    def shared(self) -> Block | None:
        """What the layers that share factors compute alike; None where that is nothing, or gives several values."""
        return shared_part(self.block, self._alike())

    def _alike(self) -> tuple[Op, ...]:
        sharing: Sharing | None = self.__dict__["_sharing"]
        return () if sharing is None else sharing.common(self.block.ops, self.block.input)

    def use(self, run: Runner | None, shared: Runner | None = None) -> None:
        """Ask ``run(input, factors, bias)`` for :attr:`own` first, and run the block where it gives None; the same for
        ``shared`` and :attr:`shared`.
        """
        asked = (run and (run, self.own.input), shared and (shared, self._alike()[-1].output), None)
        for key, way in zip((*_RUNNERS, "_quick"), asked, strict=True):
            self.__dict__.pop(key, None)
            if way is not None:
                self.__dict__[key] = way

    @property
    def on_kernels(self) -> bool:
        """Whether another way to run is asked first."""
        return any(key in self.__dict__ for key in _RUNNERS)

    def forward(self, input: Tensor) -> Tensor:
        if (quick := self.__dict__.get("_quick")) is not None and (result := quick(input)) is not None:
            return result
        return self._answer(input, self.block.ops, self._common(input, input, self.block.ops))

    def _answer(self, activation: Tensor, ops: tuple[Op, ...], common: Mapping[str, Tensor]) -> Tensor:
        """By the runner that is to be asked first, else by the block."""
        if "_runner" in self.__dict__:
            run, entry = self.__dict__["_runner"]
            result: Tensor | None = run(common.get(entry, activation), self.factors, held(self, "bias"))
            if result is not None:
                if entry == self.block.input and self.__dict__.get("_quick", run) is not None:
                    self.__dict__["_quick"] = quicker(self, run, dict(self.block.factors))
                return result
        return self._run(activation, self.bias, ops, common)

    def _common(self, given: Tensor, activation: Tensor, ops: tuple[Op, ...]) -> Mapping[str, Tensor]:
        """What the layers that share factors compute alike from the input that was given, once for all of them."""
        sharing: Sharing | None = self.__dict__["_sharing"]
        if sharing is None:
            return {}
        return sharing.values(self, given, lambda: self._values(activation, sharing.common(ops, self.block.input)))

    def _values(self, activation: Tensor, ops: tuple[Op, ...]) -> dict[str, Tensor]:
        values = {self.block.input: activation}
        if "_shared_runner" in self.__dict__:
            run, output = self.__dict__["_shared_runner"]
            result = run(activation, self.factors, None)
            if result is not None:
                return {**values, output: result}
        for op in ops:
            values[op.output] = _EMIT[op.kind](self, op, values, None)
        return values

    def _run(
        self,
        activation: Tensor,
        bias: Tensor | None,
        ops: tuple[Op, ...],
        known: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        values = {self.block.input: activation, **known}
        for op in ops:
            if op.output in known:
                continue
            if op.rebuild is not None:
                values[op.output] = self._built(op.rebuild)
                continue
            last = bias if op.output == self.block.output else None
            values[op.output] = _EMIT[op.kind](self, op, values, last)
        y = values[self.block.output]
        return y if bias is None or ops[-1].equation is not None else self._add_bias(y, bias)

    def operand(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A factor, or the weight that the block has built."""
        return values[name] if name in values else self.factor(name)

    def _built(self, shape: Rebuild) -> Tensor:
        """The dense weight; that of the last call where it may be kept and the factors are still the same."""
        factors = self.factors
        keeps = self.block.execution == "stored" and not torch.compiler.is_compiling()
        if not keeps or (torch.is_grad_enabled() and any(f.requires_grad for f in factors.values())):
            return built(shape, factors, dict(self.block.sizes))
        state = [(id(f), f.data_ptr(), -1 if f.is_inference() else f._version) for f in factors.values()]
        if self.__dict__.get("_kept", (None,))[0] != state:
            self.__dict__["_kept"] = (state, built(shape, factors, dict(self.block.sizes)).contiguous())
        kept: Tensor = self.__dict__["_kept"][1]
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_kept", "_quick", *_RUNNERS)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Factored:
        """A copy runs on the same kernels; what comes from a file does not."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        made.__dict__.update({key: self.__dict__[key] for key in _RUNNERS if key in self.__dict__})
        return made

    def _add_bias(self, result: Tensor, bias: Tensor) -> Tensor:
        return result + bias

    def _take(self, activation: Tensor, index: Tensor) -> Tensor:
        return activation.index_select(-1, index)

    _channel = -1

    def dense(self) -> nn.Module:
        """A module of the replaced class with the dense weight that the factors stand for."""
        module = copy.copy(self.__dict__["_skeleton"])
        module._parameters = dict(module._parameters)
        with torch.no_grad():
            module._parameters["weight"] = nn.Parameter(self.weight.contiguous())
        module._parameters["bias"] = self.bias
        sizes = dict(self.block.sizes)  # there may be fewer hidden units than in the replaced one
        module.__dict__.update({name: sizes[axis] for name, axis in _SIZES.items() if name in module.__dict__})
        module.training = self.training
        for name in (*_HOOKS, *_HOOK_FLAGS):
            if name in self.__dict__:
                module.__dict__[name] = self.__dict__[name]
        return module

    @property
    def _format(self) -> str:
        weight = self.block.kind.dense.inputs[1].axes
        return ", ".join([self.decomposition, *(f"{a}={n}" for a, n in self.block.sizes if a not in weight)])


class FactoredLinear(Factored):
    """``y = W x + b`` with W as a product of factors. Input (..., i), output (..., o)."""

    def __init__(self, replaced: nn.Module, block: Block, *arguments: Any) -> None:
        super().__init__(replaced, block, *arguments)
        sizes = dict(block.sizes)
        self.in_features, self.out_features = sizes["i"], sizes["o"]

    def _impulses(self) -> Tensor:
        eye = self._zeros(self.in_features, self.in_features)
        eye.fill_diagonal_(1)
        return self._run(eye, None, self.block.ops).T

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._format}, bias={self.bias is not None}"


class FactoredConv(Factored):
    """``y = W * x + b`` with W as a product of factors, for 1 to 3 window axes. Input (examples, g i, lengths...),
    output (examples, g o, positions...); stride, padding, dilation and groups are those of the replaced layer, and so
    is the memory format.
    """

    _channel = 1

    def __init__(self, replaced: nn.Module, block: Block, *arguments: Any) -> None:
        super().__init__(replaced, block, *arguments)
        sizes = dict(block.sizes)
        self.groups = sizes["g"]
        self.in_channels, self.out_channels = self.groups * sizes["i"], self.groups * sizes["o"]
        self.__dict__["_ungathered"] = without_gathers(block.ops) if self.groups == 1 else block.ops

    def forward(self, input: Tensor) -> Tensor:
        batched = input if input.ndim == len(self.block.kind.windows) + 2 else input[None]
        ops = self.block.ops if memory_format(batched) is None else self.__dict__["_ungathered"]
        inside = padded(self.__dict__["_skeleton"], batched)
        result = self._answer(inside, ops, self._common(input, inside, ops))
        return result if batched is input else result[0]

    def _add_bias(self, result: Tensor, bias: Tensor) -> Tensor:
        return result + bias.reshape(-1, *([1] * len(self.block.kind.windows)))

    def _take(self, activation: Tensor, index: Tensor) -> Tensor:
        if memory_format(activation) is None:
            return activation.index_select(1, index)
        return activation.movedim(1, -1).index_select(-1, index).movedim(-1, 1)

    def _impulses(self) -> Tensor:
        sizes, kind = dict(self.block.sizes), self.block.kind
        taps, inputs = [sizes[axis] for axis in kind.windows], sizes["i"]
        grid = self._zeros(inputs, self.groups, inputs, *(2 * size - 1 for size in taps))
        for channel in range(inputs):
            centre: tuple[Any, ...] = (channel, slice(None), channel, *(size - 1 for size in taps))
            grid[centre] = 1
        still = tuple(replace(op, windows=tuple(Window(w.axis, w.size) for w in op.windows)) for op in self.block.ops)
        answer = self._run(grid.flatten(1, 2), None, still)
        return answer.flip(tuple(range(2, 2 + len(taps)))).movedim(1, 0)

    def extra_repr(self) -> str:
        windows = [str(window) for op in self.block.ops for window in op.windows if not window.trivial]
        return (
            f"{self.in_channels}, {self.out_channels}, {self._format}, {', '.join(windows)}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


def factored(
    replaced: nn.Module,
    block: Block,
    factors: Mapping[str, Tensor],
    decomposition: str,
    bias: Tensor | None,
    sharing: Sharing | None = None,
) -> Factored:
    """The factored layer for that kind of block."""
    made = FactoredConv if block.kind.is_conv else FactoredLinear
    return made(replaced, block, factors, decomposition, bias, sharing)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain ones, of the module and of classes derived from torch's."""
    kinds = [kind for kind in reversed(type(module).__mro__) if kind.__module__.partition(".")[0] != "torch"]
    derived = {k: v for kind in kinds for k, v in vars(kind).items() if k[:2] != "__" and not hasattr(v, "__get__")}
    return derived | vars(module)


def _skeleton(module: nn.Module) -> nn.Module:
    """The module without its weight and bias: what is needed to build one of its class again."""
    bare = copy.copy(module)
    bare._parameters = dict.fromkeys(module._parameters)
    return bare


def _matmul(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return functional.linear(values[op.inputs[0]], module.operand(op.inputs[1], values), bias)


def _contract(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    split, text = contraction(op, dict(module.block.sizes))
    activation, missing = values[op.inputs[0]], math.prod(split) - values[op.inputs[0]].shape[-1]
    if missing:
        activation = functional.pad(activation, (0, missing))
    factor, axes = module.factor(op.inputs[1]), op.equation.inputs[1].axes  # type: ignore[union-attr]
    factor = factor.reshape([dict(module.block.sizes)[axis] for axis in axes])
    result = torch.einsum(text, activation.unflatten(-1, split), factor)
    result = result.flatten(activation.ndim - 1)[..., : op.stop or None]
    return result if bias is None else result + bias


_CONVOLVE: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)


def _conv(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return _convolved(module, op, values[op.inputs[0]], module.operand(op.inputs[1], values), bias)


def _whole(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    coef, index = (module.factor(name) for name in op.inputs[1:])
    factor = whole_rows(coef, index) if op.kind == ROWS else whole_columns(coef, index)
    return _convolved(module, op, values[op.inputs[0]], factor, bias)


def _convolved(module: Factored, op: Op, activation: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    kernel = factor.reshape(conv_shape(op, factor.shape)) if factor.ndim < activation.ndim else factor
    pads = [window.padding(n) for window, n in zip(op.windows, activation.shape[2:], strict=True)]
    if any(before != after for before, after in pads):
        activation = functional.pad(activation, [size for pair in reversed(pads) for size in pair])
        pads = [(0, 0)] * len(pads)
    strides, dilations = [w.stride for w in op.windows], [w.dilation for w in op.windows]
    groups = conv_groups(op, dict(module.block.sizes))
    run = _CONVOLVE[len(pads) - 1]
    return run(activation, kernel, bias, strides, [before for before, _ in pads], dilations, groups)


def _take(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    index = module.factor(op.inputs[1])
    return module._take(values[op.inputs[0]], index[op.start : op.stop])


def _concat(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return torch.cat([values[name] for name in op.inputs], module._channel)


def _add(module: Factored, op: Op, values: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    return values[op.inputs[0]] + values[op.inputs[1]]


_EMIT: dict[str, Any] = {
    "matmul": _matmul,
    "contract": _contract,
    "conv": _conv,
    "take": _take,
    "concat": _concat,
    "add": _add,
}
_EMIT |= {ROWS: _whole, COLUMNS: _whole}
