"""What the exported graph of a module tells about its weights: order, uses, and what reads their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir import Decline
from ..graph import (
    BATCH_NORMS,
    CONVOLUTIONS,
    channel_axis,
    floating_outputs,
    gain_before,
    hidden_sources,
    memory_format,
    operator,
    pointwise_reader,
    reads,
)
from .fold import Norm
from .layers import NORMS

__all__ = ["Capture", "Use", "capture", "is_hooked"]

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
        return operator(self.node) not in CONVOLUTIONS

    @property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Lengths of the input and of the output along the window axes of a convolution, None where they follow from
        the data.
        """
        before, after = self.node.args[0].meta["val"], self.node.meta["val"]  # type: ignore[union-attr]
        axes = self.node.args[1].meta["val"].ndim - 2  # type: ignore[union-attr]
        try:
            return tuple(map(int, before.shape[-axes:])), tuple(map(int, after.shape[-axes:]))
        except RuntimeError:
            return None

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
    watched: frozenset[fx.Node] = frozenset()
    """Operators of modules with hooks, which see what these read and give."""

    def gain_before(self, use: Use) -> str | None:
        """Name of the gain with which a normalisation in front multiplies the input of a linear operator."""
        return gain_before(use.node, self.parameters)

    def norm_behind(self, use: Use, model: nn.Module) -> Norm | None:
        """The batch normalisation in evaluation mode that reads this output, alone, and is called nowhere else."""
        users = list(use.node.users)
        if len(users) != 1 or operator(users[0]) not in BATCH_NORMS or users[0].args[0] is not use.node:
            return None
        path, node = _module_of(users[0]), users[0]
        module = model.get_submodule(path)
        calls = [n for n in node.graph.nodes if operator(n) in BATCH_NORMS and _module_of(n) == path]
        if not isinstance(module, NORMS) or module.running_mean is None or len(calls) != 1:
            return None
        if is_hooked(module) or channel_axis(use.node) != 1:
            return None
        paths = tuple(name for name, m in model.named_modules(remove_duplicate=False) if m is module)
        if operator(node) != "batch_norm":  # the functional form gives a tuple
            node = next((user for user in node.users if user.args[1:] == (0,)), node)
        return Norm(module, paths, node)

    def pointwise_consumer(self, use: Use, norm: Norm | None = None) -> int | None:
        """Position of the one linear operator that reads this one's output through elementwise functions only. The
        output is that of the normalisation where one is folded.
        """
        reader = pointwise_reader(use.node, use.node if norm is None else norm.output, self.watched)
        return next((u.position for uses in self.uses.values() for u in uses if u.node is reader), None)

    def hidden_producers(self, use: Use, outputs: Mapping[fx.Node, int]) -> tuple[int, ...]:
        """See :func:`tdc.frontends.graph.hidden_sources`."""
        return hidden_sources(use.node, outputs, self.watched)


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
            readers = sorted(node.users, key=positions.__getitem__)
            uses[names[node.name]] = tuple(
                Use(positions[u], str(u.target), _module_of(u), reads(u, weight=node), u) for u in readers
            )
    parameters = {n: names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in names}
    hooked = {path for path, module in model.named_modules(remove_duplicate=False) if is_hooked(module)}
    return Capture(uses, parameters, frozenset(node for node in positions if _module_of(node) in hooked))


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook looks at what goes into a module, or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _FloatingOutputs(nn.Module):
    """The model with only its floating outputs, so that caches and other objects among them do not stop the export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return list(floating_outputs(self.model(*args, **kwargs)).values())


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix(_PREFIX)
