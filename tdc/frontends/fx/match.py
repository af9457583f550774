"""Which constants of an ATen graph act linearly: one table of operators, for Dynamo's graphs and exported programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Decline, OpKind, Remark, Window
from ..graph import BATCH_NORMS, channel_axis, groups_of, operator
from ..program import passed_over_weight
from .captured import Bound

__all__ = ["Form", "Norm", "Use", "Weight", "canonical", "match", "plain", "storage_key"]


@dataclass(frozen=True)
class Form:
    """How an operator reads its weight; ``turned``: it is stored as (i, o)."""

    kind: OpKind
    turned: bool = False
    groups: int = 1
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, eq=False)
class Use:
    """One operator that reads a weight: ``activation``, its ``bias``, the constant ``root_bias`` that this is (None if
    it is none), and ``rest``, what it adds besides. ``dtype``: to which the weight is cast on its way, None for its
    own.
    """

    node: fx.Node
    form: Form
    activation: fx.Node
    bias: fx.Node | None = None
    rest: fx.Node | None = None
    root_bias: fx.Node | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch normalisation in evaluation mode that alone reads the output of one use. ``state``: the constants."""

    node: fx.Node
    output: fx.Node
    state: Mapping[str, fx.Node | None]
    eps: float


@dataclass(frozen=True, eq=False)
class Weight:
    """One stored tensor with everything that reads it, all in one form."""

    roots: tuple[fx.Node, ...]
    tensor: Tensor
    uses: tuple[Use, ...]
    norm: Norm | None = None

    @property
    def form(self) -> Form:
        return self.uses[0].form


def plain(tensor: Tensor) -> Tensor:
    """Without gradient, also where the tensor was made in inference mode (``detach`` of such a one does not do)."""
    with torch.no_grad():
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory; tensors without storage count by themselves."""
    if tensor.numel() == 0 or tensor.device.type == "meta" or not tensor.untyped_storage().nbytes():
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def canonical(form: Form, stored: Tensor) -> Tensor:
    """The weight in canonical axes, (o, i) or (g o, i, window axes); its own inverse."""
    return stored.T if form.turned else stored


def match(bound: Bound, *, values: bool = True) -> tuple[list[Weight], list[Remark]]:
    """All weights that act linearly in topological order of their first use, and why others were passed over.

    Without ``values`` the numbers in the weights are not looked at (they may be gone).
    """
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node, tensor in bound.tensors.items():
        if tensor.ndim >= 2 and (tensor.is_floating_point() or tensor.is_complex()):
            groups.setdefault(storage_key(tensor), []).append(node)
    found, remarks = [], []
    for roots in groups.values():
        answer = _weight(bound, tuple(roots), values)
        if isinstance(answer, Decline):
            remarks.append(Remark(bound.captured.names[roots[0]][0], "find-sites", answer.reason))
        elif answer is not None:
            found.append(answer)
    positions = bound.captured.positions
    found.sort(key=lambda weight: positions[weight.uses[0].node])
    return [replace(weight, norm=_norm_behind(weight, bound)) for weight in found], remarks


def _weight(bound: Bound, roots: tuple[fx.Node, ...], values: bool) -> Weight | Decline | None:
    """None for a tensor that nothing reads."""
    tensor, positions = bound.tensors[roots[0]], bound.captured.positions
    if any(root in bound.captured.written for root in roots):
        return Decline("the graph writes to it")
    answers = [answer for root in roots for answer in _readers(root, tensor, bound)]
    if not answers:
        return None
    refused = next((answer for answer in answers if isinstance(answer, Decline)), None)
    if refused is not None:
        return refused
    uses = sorted((use for use in answers if isinstance(use, Use)), key=lambda use: positions[use.node])
    if len({(use.form, use.dtype) for use in uses}) > 1:
        return Decline("its uses disagree about which axis is the output, or about groups, stride or padding")
    reason = passed_over_weight(plain(tensor)) if values else ""
    return Decline(reason) if reason else Weight(roots, tensor, tuple(uses))


def _readers(root: fx.Node, tensor: Tensor, bound: Bound) -> Iterator[Use | Decline]:
    """Everything that reads a weight, through transpositions and casts."""
    frontier: list[tuple[fx.Node, bool, torch.dtype | None]] = [(root, False, None)]
    while frontier:
        weight, turned, dtype = frontier.pop()
        for user in weight.users:
            step = _step(user, tensor)
            if step is not None:
                frontier.append((user, turned != step[0], step[1] or dtype))
                continue
            rule = _RULES.get(operator(user))
            use = rule(user, weight, tensor) if rule is not None else None
            if use is None:
                yield Decline(f"also read by {user.target} in a way that no layer does")
            elif turned and use.form.kind.is_conv:
                yield Decline(f"read by {user.target} after a transposition")
            else:
                form = replace(use.form, turned=use.form.turned != turned)
                yield _with_bias(replace(use, form=form, dtype=dtype), tensor, bound)


def _with_bias(use: Use, tensor: Tensor, bound: Bound) -> Use:
    """With the constant that its bias is, where it is one number per output."""
    bias = use.bias
    while bias is not None and bias not in bound.tensors and operator(bias) in _CASTS:
        bias = bias.args[0] if isinstance(bias.args[0], fx.Node) else None
    outputs = canonical(use.form, tensor).shape[0]
    if bias is None or bias not in bound.tensors or tuple(bound.tensors[bias].shape) != (outputs,):
        return use
    return use if bias in bound.captured.written else replace(use, root_bias=bias)


_CASTS = frozenset(["to", "_to_copy", "detach", "alias", "contiguous"])


def _step(node: fx.Node, tensor: Tensor) -> tuple[bool, torch.dtype | None] | None:
    """(transposes, dtype that it casts to) of a node that a weight passes through; None for others."""
    name = operator(node)
    if name in ("t", "numpy_T", "mT", "adjoint", "matrix_H") and tensor.ndim == 2:
        return True, None
    if name == "transpose" and tensor.ndim == 2:
        return bool((int(node.args[1]) - int(node.args[2])) % 2), None  # type: ignore[arg-type]
    if name == "permute" and tensor.ndim == 2:
        return int(node.args[1][0]) % 2 == 1, None  # type: ignore[index,arg-type]
    if name in ("detach", "alias", "contiguous"):
        return False, None
    if name in ("to", "_to_copy"):
        dtypes = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.dtype)]
        value = node.meta.get("val")
        same = isinstance(value, Tensor) and value.device == tensor.device
        return (False, dtypes[0]) if len(dtypes) == 1 and same and dtypes[0].is_floating_point else None
    return None


# ---- one rule per operator: how it reads ``weight``, or None


def _linear(node: fx.Node, weight: fx.Node, tensor: Tensor) -> Use | None:
    if tensor.ndim != 2 or not _only(node, weight, 1):
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    return Use(node, Form(OpKind.LINEAR), node.args[0], bias)  # type: ignore[arg-type]


def _matmul(node: fx.Node, weight: fx.Node, tensor: Tensor) -> Use | None:
    """``x W`` with W stored as (i, o)."""
    if tensor.ndim != 2 or not _only(node, weight, 1):
        return None
    return Use(node, Form(OpKind.LINEAR, turned=True), node.args[0])  # type: ignore[arg-type]


def _addmm(node: fx.Node, weight: fx.Node, tensor: Tensor) -> Use | None:
    """``c + x W``."""
    scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if tensor.ndim != 2 or scaled or not _only(node, weight, 2):
        return None
    added, activation = node.args[0], node.args[1]
    value = added.meta.get("val")  # type: ignore[union-attr]
    vector = isinstance(value, Tensor) and value.ndim == 1
    return Use(
        node,
        Form(OpKind.LINEAR, turned=True),
        activation,  # type: ignore[arg-type]
        bias=added if vector else None,  # type: ignore[arg-type]
        rest=None if vector else added,  # type: ignore[arg-type]
    )


def _convolution(node: fx.Node, weight: fx.Node, tensor: Tensor) -> Use | None:
    axes = tensor.ndim - 2
    if not 1 <= axes <= 3 or not _only(node, weight, 1):
        return None
    general = operator(node) == "convolution"
    if (general and node.args[6]) or isinstance(node.kwargs.get("bias"), fx.Node):
        return None
    given = [*node.args[3:6], *[None] * (6 - max(3, len(node.args)))]
    stride, pads, dilation = given[:3]
    names = ("stride", "padding", "dilation")
    stride, pads, dilation = (
        node.kwargs.get(name) if value is None else value
        for name, value in zip(names, (stride, pads, dilation), strict=True)
    )
    strides, dilations = _per_axis(stride, 1, axes), _per_axis(dilation, 1, axes)
    kind = (OpKind.CONV1D, OpKind.CONV2D, OpKind.CONV3D)[axes - 1]
    if kind.value != operator(node) and not general:
        return None
    windows = []
    for k, axis in enumerate(kind.windows):
        size = tensor.shape[2 + k]
        if pads == "same":
            total = dilations[k] * (size - 1)
            before, after = total // 2, total - total // 2
        else:
            before = after = 0 if pads == "valid" else _per_axis(pads, 0, axes)[k]
        windows.append(Window(axis, size, strides[k], dilations[k], before, after))
    bias = node.args[2] if len(node.args) > 2 else None
    form = Form(kind, groups=groups_of(node), windows=tuple(windows))
    return Use(node, form, node.args[0], bias)  # type: ignore[arg-type]


def _per_axis(given: Any, default: int, axes: int) -> list[int]:
    """An attribute of a convolution as one number per axis."""
    if given is None:
        return [default] * axes
    numbers = [int(n) for n in given] if isinstance(given, Sequence) else [int(given)]
    return numbers * axes if len(numbers) == 1 else numbers


def _only(node: fx.Node, weight: fx.Node, place: int) -> bool:
    """Whether a node reads the weight in that place and nowhere else."""
    if len(node.args) <= place or node.args[place] is not weight or not isinstance(node.args[0], fx.Node):
        return False
    return sum(a is weight for a in (*node.args, *node.kwargs.values())) == 1


_RULES: Mapping[str, Callable[[fx.Node, fx.Node, Tensor], Use | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "convolution": _convolution,
}

# ---- normalisations

_ARGUMENTS = {
    "batch_norm": (5, 7),
    "_native_batch_norm_legit_no_training": (None, 6),
    "cudnn_batch_norm": (5, 7),
}
"""Operator -> places of ``training`` and of ``eps`` among its arguments; the state is at 1 to 4."""


def _norm_behind(weight: Weight, bound: Bound) -> Norm | None:
    """The batch normalisation in evaluation mode that reads the one use's output, alone, and is called nowhere else."""
    use = weight.uses[0]
    users = list(use.node.users)
    if len(weight.uses) != 1 or len(users) != 1 or use.rest is not None or operator(users[0]) not in BATCH_NORMS:
        return None
    node = users[0]
    training, eps = _ARGUMENTS[operator(node)]
    gamma, beta, mean, variance = node.args[1:5]
    state = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
    known = all(entry is None or entry in bound.tensors for entry in state.values())
    if not known or mean is None or variance is None or (training is not None and node.args[training]):
        return None
    if node.args[0] is not use.node or channel_axis(use.node) != 1 or len(mean.users) != 1:  # type: ignore[union-attr]
        return None
    if any(entry in bound.captured.written for entry in state.values() if entry is not None):
        return None
    if use.bias is not None and use.root_bias is None:
        return None
    output = node
    if operator(node) != "batch_norm":  # the functional form gives a tuple
        output = next((user for user in node.users if user.args[1:] == (0,)), node)
        if len(node.users) != 1 or output is node:
            return None
    return Norm(node, output, state, float(node.args[eps]))  # type: ignore[arg-type]
