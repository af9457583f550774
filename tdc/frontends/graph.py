"""Reading ATen graphs of the vocabulary of ``torch.export``: which operators are linear, and what keeps channels apart.

Shared by the frontends whose models become such graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import Rebuild

__all__ = [
    "BATCH_NORMS",
    "CONVOLUTIONS",
    "added_to",
    "built",
    "channel_axis",
    "floating_outputs",
    "fold_norm",
    "gain_before",
    "groups_of",
    "hidden_sources",
    "memory_format",
    "operator",
    "pointwise_reader",
    "reads",
    "run_backward",
]

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
BATCH_NORMS = frozenset(["batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"])
CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d", "convolution"])
_SLOTS = {"linear": (0, 1), "addmm": (1, 2), **dict.fromkeys(CONVOLUTIONS, (0, 1))}
"""Operator -> places of the activation and of the weight among its arguments."""
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def operator(node: fx.Node) -> str:
    """``aten.conv2d.padding -> conv2d``; '' for what is no operator of torch."""
    return str(node.target).partition("aten.")[2].partition(".")[0] if node.op == "call_function" else ""


def reads(node: fx.Node, *, activation: fx.Node | None = None, weight: fx.Node | None = None) -> bool:
    """A linear operator or convolution that reads ``activation`` as its input, or ``weight`` as its weight only."""
    slots = _SLOTS.get(operator(node))
    if slots is None or len(node.args) <= max(slots) or (operator(node) == "convolution" and node.args[6]):
        return False
    if activation is not None:
        return node.args[slots[0]] is activation
    return node.args[slots[1]] is weight and sum(a is weight for a in node.args) == 1


def groups_of(node: fx.Node) -> int:
    """Groups of a convolution; 1 for a linear operator."""
    place = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "convolution": 8}.get(operator(node))
    if place is None:
        return 1
    return int(node.args[place]) if len(node.args) > place else int(node.kwargs.get("groups", 1))  # type: ignore


def channel_axis(node: fx.Node) -> int:
    """Axis of the outputs of a linear operator or convolution, counted from the front."""
    value = node.meta.get("val")
    rank = value.ndim if isinstance(value, Tensor) else 0
    return 1 if operator(node) in CONVOLUTIONS and rank > 2 else rank - 1


def pointwise_reader(use: fx.Node, source: fx.Node, watched: Collection[fx.Node] = ()) -> fx.Node | None:
    """The one linear operator that reads ``source`` through elementwise functions only, none of them ``watched``.

    ``source`` is the output of the linear operator ``use``, or of the normalisation folded into that. None for
    convolutions: a gather of their channels costs little, and each keeps its order.
    """
    if operator(use) in CONVOLUTIONS:
        return None
    inside, frontier, readers = {source}, [source], set()
    while frontier:
        node = frontier.pop()
        for user in node.users:
            if user in watched:
                return None
            if reads(user, activation=node) and operator(user) not in CONVOLUTIONS:
                readers.add(user)
            elif not _passes(user, node):
                return None
            elif user not in inside:
                inside.add(user)
                frontier.append(user)
    others = (a for node in inside - {source} for a in node.all_input_nodes if a not in inside)
    if len(readers) != 1 or any(not _is_scalar(other) for other in others):
        return None
    return readers.pop()


def hidden_sources(use: fx.Node, outputs: Mapping[fx.Node, int], watched: Collection[fx.Node] = ()) -> tuple[int, ...]:
    """Whose outputs the input of a linear operator is made of by elementwise functions, where all of these have its
    rank and last axis and go nowhere else, and none is ``watched``; () where it is not so. ``outputs``: of other linear
    operators, each with its number.
    """
    if operator(use) not in _SLOTS or operator(use) in CONVOLUTIONS:
        return ()
    start = use.args[_SLOTS[operator(use)][0]]
    shape = _shape(start)
    inside, frontier, sources = {start}, [start], set()
    while frontier:
        node = frontier.pop()
        if not isinstance(node, fx.Node) or node in watched:
            return ()
        if node in outputs:
            sources.add(outputs[node])
        elif operator(node) not in _POINTWISE:
            return ()
        else:
            new = {a for a in node.all_input_nodes if not _is_scalar(a)} - inside
            inside |= new
            frontier += new
    alike = shape is not None and all(_shape(node) == shape for node in inside)
    closed = all(user is use or user in inside for node in inside for user in node.users)  # type: ignore[union-attr]
    once = sum(a is start for a in use.all_input_nodes) == 1
    return tuple(sorted(sources)) if alike and closed and once else ()


def _shape(node: Any) -> tuple[int, int] | None:
    """Rank and length of the last axis, which no symbol has."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or not value.ndim or not isinstance(value.shape[-1], int):
        return None
    return value.ndim, value.shape[-1]


def added_to(output: fx.Node) -> fx.Node | None:
    """What the output of an operator is added to, where that is all that is done with it (a residual connection)."""
    node = output
    while len(node.users) == 1:
        (user,) = node.users
        if operator(user) in ("add", "add_"):
            others = [a for a in user.args if a is not node]
            plain = len(user.args) == 2 and not user.kwargs and len(others) == 1
            return others[0] if plain and isinstance(others[0], fx.Node) else None
        if operator(user) not in _HAND_ON | _RESHAPES:
            return None
        node = user
    return None


def gain_before(use: fx.Node, vectors: Mapping[fx.Node, str]) -> str | None:
    """Name of the vector that the input of a linear operator has just been multiplied with, by a normalisation or by
    itself; ``vectors`` are the names of the parameters that are nodes of the graph.
    """
    if operator(use) not in _SLOTS:
        return None
    node = use.args[_SLOTS[operator(use)][0]]
    width = node.meta["val"].shape[-1]  # type: ignore[union-attr]
    while isinstance(node, fx.Node) and operator(node) in _HAND_ON:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    if operator(node) in ("layer_norm", "rms_norm"):
        operands: tuple[Any, ...] = node.args[2:3]
    else:
        operands = node.args[:2] if operator(node) == "mul" else ()
    known = [a for a in operands if isinstance(a, fx.Node) and a in vectors]
    fitting = [a for a in known if tuple(a.meta["val"].shape) == (width,)]
    return vectors[fitting[0]] if len(fitting) == 1 else None


def _passes(node: fx.Node, source: fx.Node) -> bool:
    """An elementwise operator, or a reshape that leaves the last axis alone."""
    if operator(node) in _RESHAPES:
        before, after = (n.meta.get("val") for n in (source, node))
        return isinstance(before, Tensor) and isinstance(after, Tensor) and bool(before.shape[-1:] == after.shape[-1:])
    return operator(node) in _POINTWISE


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.numel() == 1


def fold_norm(
    weight: Tensor, bias: Tensor | None, state: Mapping[str, Tensor | None], eps: float
) -> tuple[Tensor, Tensor]:
    """``W' = diag(s) W`` and ``b' = beta + s (b - mean)`` with ``s = gamma / sqrt(var + eps)``.

    ``weight`` (outputs, ...); the results have its dtype. ``state``: running_mean, running_var, and weight (gamma) and
    bias (beta) where the normalisation has them. Worked out in float32 (float64 for float64) and in this order, as
    exporters do it, so that a module and its export hold the same weight to the last bit; for torch's root of float32
    numbers is not always the nearest one, it is taken in float64.
    """
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    known = {name: t.detach().to(exact) for name, t in state.items() if t is not None}
    var, mean = known["running_var"], known["running_mean"]
    scale = known.get("weight", torch.ones_like(var)) / (var + eps).double().sqrt().to(exact)
    centred = -mean if bias is None else bias.to(exact) - mean
    folded = weight.to(exact) * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    return folded.to(weight.dtype), (centred * scale + known.get("bias", 0.0)).to(weight.dtype)


def built(shape: Rebuild, factors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """The dense weight in canonical axes, by a rebuild equation without pivots."""
    whole: Tensor | None = None
    for piece in shape.pieces:
        terms = zip(piece.operands, piece.equation.inputs, strict=True)
        operands = [factors[name].reshape([sizes[axis] for axis in term.axes]) for name, term in terms]
        part = torch.einsum(piece.equation.subscripts(), *operands).reshape(shape.output.shape(sizes))
        whole = part if whole is None else whole + part
    assert whole is not None
    return whole if "g" in sizes else whole[: sizes["o"], : sizes["i"]]


def memory_format(tensor: Tensor) -> torch.memory_format | None:
    """The channels-last format of a tensor that has it and is not contiguous as well."""
    wanted = _FORMATS.get(tensor.ndim)
    if wanted is None or tensor.is_contiguous():
        return None
    return wanted if tensor.is_contiguous(memory_format=wanted) else None


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


def run_backward(loss: Callable[[Mapping[str, Tensor]], Tensor], outputs: Mapping[str, Tensor]) -> str:
    """Backwards from a loss of the outputs; why it cannot be done, '' where it was."""
    reached = {name: values for name, values in outputs.items() if values.requires_grad}
    if not reached:
        return "no output of the model has a gradient"
    try:
        loss(reached).backward()
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return f"the model cannot run backwards: {first}"
    return ""
