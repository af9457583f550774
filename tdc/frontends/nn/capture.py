"""What the exported graph of a module tells about its weights: order, uses, and what reads their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir import Decline
from .fold import Norm
from .layers import NORMS, memory_format

__all__ = ["Capture", "Use", "capture", "floating_outputs"]

_PREFIX = "model."


@dataclass(frozen=True)
class Use:
    """One operator that reads a parameter: its position in the graph, its name, the module that called it."""

    position: int
    operator: str
    module: str
    linear: bool
    node: fx.Node = field(repr=False, compare=False)

    @property
    def is_linear(self) -> bool:
        return _operator(self.node) not in _CONVOLUTIONS

    @property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of the input and of the output along the window axes of a convolution."""
        before, after = self.node.args[0].meta["val"], self.node.meta["val"]  # type: ignore[union-attr]
        axes = self.node.args[1].meta["val"].ndim - 2  # type: ignore[union-attr]
        return tuple(map(int, before.shape[-axes:])), tuple(map(int, after.shape[-axes:]))

    @property
    def channels_last(self) -> bool:
        """Whether the activation lies channels-last on the example."""
        value = self.node.args[0].meta.get("val")  # type: ignore[union-attr]
        return isinstance(value, Tensor) and memory_format(value) is not None


@dataclass(frozen=True)
class Capture:
    """Uses of every parameter by its qualified name, from ``torch.export``."""

    uses: Mapping[str, tuple[Use, ...]]
    parameters: Mapping[fx.Node, str] = field(default_factory=dict)
    """Qualified names of the parameters that are nodes of the graph."""

    def gain_before(self, use: Use) -> str | None:
        """Name of the vector that the input of a linear operator has just been multiplied with, by a normalisation or
        by itself.
        """
        node = use.node.args[_SLOTS[_operator(use.node)][0]]
        width = node.meta["val"].shape[-1]  # type: ignore[union-attr]
        while isinstance(node, fx.Node) and _operator(node) in _HAND_ON:
            node = node.args[0]
        if not isinstance(node, fx.Node):
            return None
        name = _operator(node)
        if name in ("layer_norm", "rms_norm"):
            operands: tuple[Any, ...] = node.args[2:3]
        else:
            operands = node.args[:2] if name == "mul" else ()
        vectors = [a for a in operands if isinstance(a, fx.Node) and a in self.parameters]
        fitting = [a for a in vectors if tuple(a.meta["val"].shape) == (width,)]
        return self.parameters[fitting[0]] if len(fitting) == 1 else None

    def norm_behind(self, use: Use, model: nn.Module) -> Norm | None:
        """The batch normalisation in evaluation mode that reads this output, alone, and is called nowhere else."""
        users = list(use.node.users)
        if len(users) != 1 or _operator(users[0]) not in _NORMS or users[0].args[0] is not use.node:
            return None
        path, node = _module_of(users[0]), users[0]
        module = model.get_submodule(path)
        calls = [n for n in use.node.graph.nodes if _operator(n) in _NORMS and _module_of(n) == path]
        if not isinstance(module, NORMS) or module.running_mean is None or len(calls) != 1:
            return None
        if module._forward_hooks or module._forward_pre_hooks or _channel_axis(use.node) != 1:
            return None
        paths = tuple(name for name, m in model.named_modules(remove_duplicate=False) if m is module)
        if _operator(node) != "batch_norm":  # the functional form gives a tuple
            node = next((user for user in node.users if user.args[1:] == (0,)), node)
        return Norm(module, paths, node)

    def pointwise_consumer(self, use: Use, norm: Norm | None = None) -> int | None:
        """Position of the one linear operator that reads this one's output through elementwise functions only. The
        output is that of the normalisation where one is folded.

        None for convolutions: a gather of their channels costs little, and each keeps its order.
        """
        if not use.is_linear:
            return None
        source = use.node if norm is None else norm.output
        inside, frontier, readers = {source}, [source], set()
        while frontier:
            node = frontier.pop()
            for user in node.users:
                if _reads(user, activation=node) and _operator(user) not in _CONVOLUTIONS:
                    readers.add(user)
                elif not _passes(user, node):
                    return None
                elif user not in inside:
                    inside.add(user)
                    frontier.append(user)
        others = (a for node in inside - {source} for a in node.all_input_nodes if a not in inside)
        if len(readers) != 1 or any(not _is_scalar(other) for other in others):
            return None
        reader = readers.pop()
        return next((u.position for uses in self.uses.values() for u in uses if u.node is reader), None)


_POINTWISE = frozenset(
    """
    add mul sub div neg pow abs relu relu6 gelu silu tanh sigmoid log_sigmoid elu selu celu mish erf exp expm1 log log1p
    logit sqrt square rsqrt reciprocal sign floor ceil hardtanh hardswish hardsigmoid leaky_relu softplus softsign
    threshold clamp clamp_min clamp_max minimum maximum where gt lt ge le dropout clone contiguous to _to_copy
    relu_ relu6_ silu_ hardtanh_ hardswish_ hardsigmoid_ leaky_relu_ elu_ selu_ celu_ mish_ clamp_ clamp_min_ add_ mul_
    """.split()
)
_HAND_ON = frozenset(["to", "_to_copy", "dropout", "clone", "contiguous", "view", "reshape", "detach"])
_RESHAPES = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten"])
_NORMS = frozenset(["batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"])
_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d", "convolution"])
_SLOTS = {"linear": (0, 1), "addmm": (1, 2), **dict.fromkeys(_CONVOLUTIONS, (0, 1))}
"""Operator -> places of the activation and of the weight among its arguments."""


def _operator(node: fx.Node) -> str:
    """``aten.conv2d.padding -> conv2d``; '' for what is no operator of torch."""
    return str(node.target).partition("aten.")[2].partition(".")[0] if node.op == "call_function" else ""


def _channel_axis(node: fx.Node) -> int:
    """Axis of the outputs of a linear operator or convolution, counted from the front."""
    value = node.meta.get("val")
    rank = value.ndim if isinstance(value, Tensor) else 0
    return 1 if _operator(node) in _CONVOLUTIONS and rank > 2 else rank - 1


def _passes(node: fx.Node, source: fx.Node) -> bool:
    """An elementwise operator, or a reshape that leaves the last axis alone."""
    if _operator(node) in _RESHAPES:
        before, after = (n.meta.get("val") for n in (source, node))
        return isinstance(before, Tensor) and isinstance(after, Tensor) and bool(before.shape[-1:] == after.shape[-1:])
    return _operator(node) in _POINTWISE


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.numel() == 1


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Capture | Decline:
    """Export ``model`` on these inputs and read the uses of its parameters, or say why it cannot be exported."""
    try:
        with torch.no_grad():
            program = torch.export.export(_FloatingOutputs(model), args, dict(kwargs), strict=False)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return Decline(
            f"torch.export cannot capture the model ({type(error).__name__}: {first}); the module tree is used"
        )
    names = {k: v.removeprefix(_PREFIX) for k, v in program.graph_signature.inputs_to_parameters.items()}
    positions = {node: k for k, node in enumerate(program.graph.nodes)}
    uses: dict[str, tuple[Use, ...]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            reads = sorted(node.users, key=positions.__getitem__)
            uses[names[node.name]] = tuple(
                Use(positions[u], str(u.target), _module_of(u), _reads(u, weight=node), u) for u in reads
            )
    return Capture(uses, {n: names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in names})


class _FloatingOutputs(nn.Module):
    """The model with only its floating outputs, so that caches and other objects among them do not stop the export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return list(floating_outputs(self.model(*args, **kwargs)).values())


def floating_outputs(output: Any, name: str = "output") -> dict[str, Tensor]:
    """Floating tensors in what a model returned (a tensor, a mapping, a sequence, a dataclass), by key or place;
    others are left out.
    """
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        pairs = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        keys = getattr(output, "_fields", None) or [f"{name}_{k}" for k in range(len(output))]
        pairs = list(zip(keys, output, strict=False))
    elif is_dataclass(output) and not isinstance(output, type):
        pairs = [(entry.name, getattr(output, entry.name, None)) for entry in fields(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        found |= floating_outputs(value, key)
    return found


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix(_PREFIX)


def _reads(node: fx.Node, *, activation: fx.Node | None = None, weight: fx.Node | None = None) -> bool:
    """A linear operator or convolution that reads ``activation`` as its input, or ``weight`` as its weight only."""
    slots = _SLOTS.get(_operator(node))
    if slots is None or len(node.args) <= max(slots) or (_operator(node) == "convolution" and node.args[6]):
        return False
    if activation is not None:
        return node.args[slots[0]] is activation
    return node.args[slots[1]] is weight and sum(a is weight for a in node.args) == 1
