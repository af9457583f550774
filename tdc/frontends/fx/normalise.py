"""Dynamo's graphs as graphs of pre-dispatch ATen operators, the vocabulary of ``torch.export``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import CalibrationError, ModelError
from ..graph import floating_outputs, operator
from .captured import Captured, Values

__all__ = ["fake_mode", "held_by_the_model", "normalise", "qualified_name"]


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """A graph that Dynamo gives to a backend, opened up: ``linear``, ``conv2d``, ``embedding``,
    ``scaled_dot_product_attention`` stay whole, composites are opened. ``gm`` stays as it is: Dynamo reads it again.

    Placeholders come in the same order. Raises ModelError for a graph without tensors.
    """
    old = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value", node.meta.get("val")) for node in old]
    mode = fake_mode(fakes)

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*args)

    module = _traced(run, fakes, mode)
    new = module.graph.find_nodes(op="placeholder")
    for node, fake in zip(new, fakes, strict=True):
        node.meta["val"] = fake  # itself: it remembers the symbol that its number has
    for node in reversed(list(module.graph.nodes)):
        if operator(node) in ("item", "_local_scalar_dense") and not node.users:
            module.graph.erase_node(node)
    static = held_by_the_model(gm, example_inputs)
    names: dict[fx.Node, tuple[str, ...]] = {}
    for node, placeholder, is_held in zip(old, new, static, strict=True):
        if is_held:
            names[placeholder] = (qualified_name(node) or str(node.target),)
    for node in module.graph.find_nodes(op="get_attr"):
        held = getattr(module, str(node.target), None)
        if isinstance(held, Tensor):
            names[node] = (str(node.target),)
    sources = [node for node, is_held in zip(old, static, strict=True) if not is_held]
    arguments = tuple((re.findall(r"\w+", _source_text(node)) or [""])[-1] for node in sources)
    return Captured(module, names, _reader(sources), _labels(gm), _ambient(), arguments)


def _traced(run: Callable[..., Any], fakes: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """Traced before dispatch, where ``linear`` is whole. What stands inside ``vmap`` cannot be traced there (a scan of
    a state-space model): such graphs are traced behind it, where ``linear`` is ``t`` and ``addmm``.

    Raises ModelError where neither gives a graph that can run.
    """
    for early in (True, False):
        with mode:
            module = make_fx(run, pre_dispatch=early, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
        held = [getattr(module, str(node.target), None) for node in module.graph.find_nodes(op="get_attr")]
        if not any(isinstance(tensor, Tensor) and _is_of_a_trace(tensor) for tensor in held):
            return module
    raise ModelError("the graph has parts that cannot be traced")


def _is_of_a_trace(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers of its own and lives only while a trace does."""
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def fake_mode(fakes: Sequence[Any]) -> FakeTensorMode:
    """The mode of Dynamo's own fake tensors: ``detect_fake_mode`` gives another one while a backend runs."""
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        raise ModelError("the graph has no tensor among its inputs")
    return mode


def held_by_the_model(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[bool]:
    """For each placeholder whether it is a parameter, a buffer or another tensor that a module holds."""
    answers = []
    for node, example in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        marked = bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))
        answers.append(isinstance(example, Tensor) and (isinstance(example, nn.Parameter) or marked))
    return answers


_CONTAINERS = ("_modules", "_parameters", "_buffers")


def qualified_name(node: fx.Node) -> str:
    """``L['self']._modules['b']._parameters['weight'] -> b.weight``, from the chain of a placeholder's source; '' if it
    has none.
    """
    source, steps = getattr(node, "_dynamo_source", None), []
    while source is not None:
        index, member = getattr(source, "index", None), getattr(source, "member", None)
        if index is not None or member is not None:
            steps.append(str(member if index is None else index))
        source = getattr(source, "base", None)
    steps.reverse()
    # What comes before the first container is how the frame reaches the module, which is no part of a name.
    start = next((k for k, step in enumerate(steps) if step in _CONTAINERS), max(0, len(steps) - 1))
    return ".".join(step for step in steps[start:] if step not in _CONTAINERS)


def _source_text(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name


class _Whatever(dict[str, Any]):
    """The locals of a frame, as far as a batch tells them: also behind a wrapper that takes ``*args, **kwargs``."""

    def __missing__(self, key: str) -> Any:
        if key in ("kwargs", "inputs"):
            return self
        raise KeyError(key)


def _reader(nodes: Sequence[fx.Node]) -> Callable[[Any], Values]:
    """Finds a graph's inputs in a batch of the model's arguments: a dict by their names, a tuple by their places behind
    ``*args``, a tensor if there is one only.
    """
    texts, tensors = [_source_text(node) for node in nodes], []
    for node in nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        tensors.append(isinstance(value, Tensor))

    def read(batch: Any) -> Values:
        if isinstance(batch, Tensor):
            batch = (batch,)
        if isinstance(batch, (tuple, list)) and sum(tensors) == 1:
            return tuple(batch[0] if tensor else 0 for tensor in tensors)
        given = _Whatever(batch) if isinstance(batch, Mapping) else _Whatever(args=tuple(batch))
        found = []
        for text, tensor in zip(texts, tensors, strict=True):
            try:
                found.append(eval(text, {"L": given, "__builtins__": {}}) if tensor else 0)
            except Exception as error:
                raise CalibrationError(
                    f"the calibration batch does not tell the graph's input {text}: give dicts by the names of the "
                    f"arguments, or gather the model's own calls by calibrate_calls="
                ) from error
        return tuple(found)

    return read


def _labels(gm: fx.GraphModule) -> Callable[[Any], Mapping[str, Tensor]]:
    """Names what the graph gives after Dynamo's nodes, which it names after the variables of the model's code."""
    (given,) = gm.graph.output_node().args
    nodes = given if isinstance(given, (tuple, list)) else (given,)
    names = [node.name if isinstance(node, fx.Node) else f"output_{k}" for k, node in enumerate(nodes)]

    def label(output: Any) -> Mapping[str, Tensor]:
        entries = output if isinstance(output, (tuple, list)) else (output,)
        return floating_outputs(dict(zip(names, entries, strict=True)))

    return label


def _ambient() -> Callable[[], AbstractContextManager[Any]]:
    """The autocast in which the model is called: graphs do not show it."""
    kind = "cuda" if torch.cuda.is_available() and torch.is_autocast_enabled("cuda") else "cpu"
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype)
