"""What the exported graph of a module tells about its weights: order, uses, and pointwise consumers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir import Decline

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


@dataclass(frozen=True)
class Capture:
    """Uses of every parameter by its qualified name, from ``torch.export``."""

    uses: Mapping[str, tuple[Use, ...]]

    def pointwise_consumer(self, use: Use) -> int | None:
        """Position of the one linear operator that reads this one's output through elementwise functions only."""
        inside, frontier, readers = {use.node}, [use.node], set()
        while frontier:
            node = frontier.pop()
            for user in node.users:
                if _is_linear(user, node):
                    readers.add(user)
                elif not _passes(user, node):
                    return None
                elif user not in inside:
                    inside.add(user)
                    frontier.append(user)
        others = (a for node in inside - {use.node} for a in node.all_input_nodes if a not in inside)
        if len(readers) != 1 or any(not _is_scalar(other) for other in others):
            return None
        reader = readers.pop()
        return next((u.position for uses in self.uses.values() for u in uses if u.node is reader), None)


_POINTWISE = frozenset(
    """
    add mul sub div neg pow abs relu relu6 gelu silu tanh sigmoid log_sigmoid elu selu celu mish erf exp expm1 log log1p
    logit sqrt square rsqrt reciprocal sign floor ceil hardtanh hardswish hardsigmoid leaky_relu softplus softsign
    threshold clamp clamp_min clamp_max minimum maximum where gt lt ge le dropout clone contiguous to _to_copy
    """.split()
)
_RESHAPES = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten"])


def _passes(node: fx.Node, source: fx.Node) -> bool:
    """An elementwise operator, or a reshape that leaves the last axis alone."""
    _, _, name = str(node.target).partition("aten.")
    name = name.partition(".")[0]
    if name in _RESHAPES:
        before, after = (n.meta.get("val") for n in (source, node))
        return isinstance(before, Tensor) and isinstance(after, Tensor) and bool(before.shape[-1:] == after.shape[-1:])
    return name in _POINTWISE


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
                Use(positions[u], str(u.target), _module_of(u), _is_linear(u, None, node), u) for u in reads
            )
    return Capture(uses)


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


def _is_linear(node: fx.Node, activation: fx.Node | None = None, weight: fx.Node | None = None) -> bool:
    """A linear operator that reads ``activation`` as its input, or ``weight`` as its weight only."""
    slots = {"aten.linear.default": (0, 1), "aten.addmm.default": (1, 2)}.get(str(node.target))
    if slots is None or len(node.args) <= max(slots):
        return False
    if activation is not None:
        return node.args[slots[0]] is activation
    return node.args[slots[1]] is weight and sum(a is weight for a in node.args) == 1
