"""How long the operators of a file take in onnxruntime on this machine, as they are and as blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...ir import Block, Site
from ..clock import Run, alike, copies_of, in_turn, part_of_run, seconds_of, stand_ins, stored_numbers
from ..program import Kernel, Replacement
from .constants import known
from .emit import Emitter
from .running import clone, moved
from .runtime import Session
from .tail import NO_TAIL
from .tensors import array, stored, to_numpy
from .uses import Use

__all__ = ["Met", "Stopwatch", "example_of", "whole"]


@dataclass(frozen=True, eq=False)
class Met:
    """A use, and the activation that entered it."""

    use: Use
    activation: np.ndarray


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Times a file, and single operators of it, each in a session of its own, on the activations that they met in it.
    What a call of onnxruntime costs by itself is taken off. ``met``: by ``site.order``.
    """

    source: ir.Model
    whole: Run
    sites: Sequence[Site]
    met: Mapping[int, Sequence[Met]]

    def model(self) -> tuple[float, float]:
        """Seconds of a run of the whole file, the fastest, and what part of a run its sites take."""
        inside = []
        for site, count in alike(self.sites, self.key):
            runs = [_run(alone(self.source, met), met, None, 0) for met in self.met[site.order]]
            inside.append((in_turn(runs), count))
        return part_of_run(self.whole, inside, _empty())

    def key(self, site: Site) -> object:
        """Equal for sites that take the same time."""
        met = self.met.get(site.order, ())
        shapes = tuple((m.use.node.op_type, str(m.use.form), m.activation.shape, m.use.tail.norm is None) for m in met)
        return (site.kind, site.sizes, site.attributes, site.dtype, site.bias, shapes)

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[Kernel | None] = ()) -> list[float]:
        """Seconds that a site takes in a run, as it is and in place of it with each block, by stock operators."""
        met = self.met[site.order]
        whole = [alone(self.source, one) for one in met]
        whole_size = sum(other.params for other in self.sites) * met[0].activation.itemsize
        contestants: list[list[Run]] = [[_empty()]]
        for block in (None, *blocks):
            entering = [_fitting(one, block) for one in met]
            pairs = zip(whole, met, entering, strict=True)
            small = [own if new is old else alone(self.source, new) for own, old, new in pairs]
            numbers = stored_numbers(block) if block is not None else site.params
            copies = range(copies_of(numbers * met[0].activation.itemsize, whole_size))
            rows = [[_run(own, one, block, seed) for own, one in zip(small, entering, strict=True)] for seed in copies]
            contestants.append([in_turn(runs) for runs in rows])
        empty, *taken = seconds_of(contestants)
        return [max(seconds - len(met) * empty, 1e-7) for seconds in taken]


def _fitting(met: Met, block: Block | None) -> Met:
    """With as much of the activation as the block has inputs: it may know fewer hidden units."""
    if block is None or block.kind.is_conv:
        return met
    width, axis = dict(block.sizes)["i"], met.activation.ndim - 1 - met.use.turned
    if width == met.activation.shape[axis]:
        return met
    return replace(met, activation=np.ascontiguousarray(met.activation.take(np.arange(width), axis)))


def example_of(inputs: Sequence[ir.Value]) -> dict[str, np.ndarray] | None:
    """Made-up inputs, ones, of a graph whose sizes are all fixed; None for any other."""
    made = {}
    for value in inputs:
        if value.const_value is not None:
            continue
        sizes = [d for d in value.shape or [None] if isinstance(d, int)]
        if not isinstance(value.type, ir.TensorType) or value.shape is None or len(sizes) < len(value.shape):
            return None
        made[value.name or ""] = np.ones(sizes, value.type.dtype.numpy())
    return made


def whole(model: ir.Model, batch: Mapping[str, Any]) -> Run:
    """A session of the whole model on the batch."""
    session, outputs = Session(clone(model)[0]), [value.name or "" for value in model.graph.outputs]
    return lambda: session.run(outputs, batch)


def alone(source: ir.Model, met: Met) -> tuple[ir.Model, Use]:
    """A model of one use alone, its activation the only input; without a bias that is no constant."""
    copy, values = clone(source)
    own = met.use if met.use.tail.norm is not None else replace(met.use, tail=NO_TAIL)
    use = moved(own, dict(zip(source.graph, copy.graph, strict=True)), values)
    reader = use.node if use.pad is None else use.pad
    dtype = ir.DataType.from_numpy(met.activation.dtype)
    entry = ir.Value(name="tdc.activation", shape=ir.Shape(met.activation.shape), type=ir.TensorType(dtype))
    place = use.form.data if use.pad is None else 0
    output = use.output
    output.type = output.type or ir.TensorType(dtype)
    graph = copy.graph
    reader.replace_input_with(place, entry)
    if len(use.node.inputs) > 2 and known(use.node.inputs[2]) is None:
        use.node.replace_input_with(2, None)
    graph.outputs.clear()
    graph.outputs.append(output)
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    graph.inputs.clear()
    graph.inputs.append(entry)
    return copy, use


def _run(own: tuple[ir.Model, Use], met: Met, block: Block | None, seed: int) -> Run:
    """A session with other weights, or with a block in place of the use."""
    model, values = clone(own[0])
    use = moved(own[1], dict(zip(own[0].graph, model.graph, strict=True)), values)
    if block is None:
        tensor = stored(use.root)
        assert tensor is not None
        entries = torch.randn(tuple(tensor.shape.numpy()), generator=torch.Generator().manual_seed(seed))
        _store(model, use.root, ir.Tensor(to_numpy(entries, tensor.dtype), dtype=tensor.dtype, name=use.root.name))
    else:
        factors = stand_ins(block, _dtype(use), torch.device("cpu"), seed)
        outputs = use.width if block.kind.is_conv else dict(block.sizes)["o"]
        bias = None if use.tail.norm is None and outputs == use.width else np.zeros(outputs)
        Emitter(model).replace((use,), Replacement(block, factors, ""), "timed", bias)
    session, feeds = Session(model), {"tdc.activation": met.activation}
    names = [value.name or "" for value in model.graph.outputs]
    return lambda: session.run(names, feeds)


def _dtype(use: Use) -> torch.dtype:
    tensor = stored(use.root)
    assert tensor is not None
    kind: torch.dtype = torch.from_numpy(np.zeros(1, array(tensor).dtype)).dtype
    return kind


def _store(model: ir.Model, root: ir.Value, tensor: ir.Tensor) -> None:
    """Other numbers for a stored weight: of an initializer, or of what a Constant node gives."""
    if root.producer() is None:
        root.const_value = tensor
        return
    value = ir.Value(name=f"{root.name}.tdc", const_value=tensor, shape=root.shape, type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    root.replace_all_uses_with(value)


def _empty() -> Run:
    """A session that does next to nothing."""
    entry = ir.Value(name="x", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [entry])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = entry.type, entry.shape
    graph = ir.Graph([entry], [node.outputs[0]], nodes=[node], opset_imports={"": 13}, name="empty")
    session, feeds = Session(ir.Model(graph, ir_version=8)), {"x": np.zeros(1, np.float32)}
    return lambda: session.run(["y"], feeds)
