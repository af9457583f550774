"""Putting replacements into a copy of a captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from ...errors import VerificationError
from ..graph import hidden_sources, pointwise_reader
from ..program import Replacement
from .captured import Captured
from .emit import Emitter, Kernels
from .match import Form, Use, Weight

__all__ = [
    "Cut",
    "Rewritten",
    "hidden_readers",
    "pointwise_reader_of",
    "reader_of",
    "rewrite",
    "sources",
    "takes_any_order",
]


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A graph with blocks in it. Its placeholders are those of the old one at ``kept``, in order, then one for each of
    ``constants``; ``replaced`` counts the sites, and ``baked`` are old constants whose values went into new ones.
    ``paths``: qualified names for the new constants, ``fc.weight_rows``.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    constants: Mapping[str, Tensor]
    replaced: int
    baked: tuple[fx.Node, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """From the arguments of the old graph those of this one."""
        return [*(given[k] for k in self.kept), *self.constants.values()]


@dataclass(frozen=True, eq=False)
class Cut:
    """The replacement of one weight, with the bias that its output gets (None: the use's own), the name of the weight
    with which it shares factors, and how it was read where that was decided. ``reader``: the weight that expects its
    output in another order.
    """

    new: Replacement
    bias: Tensor | None
    name: str
    lead: str
    form: Form
    norm: bool
    single: bool
    reader: tuple[int, ...] | None


def sources(weight: Weight) -> tuple[fx.Node, ...]:
    """The constants from which the factors and the bias of a weight are made."""
    biases = [use.root_bias for use in weight.uses]
    state = weight.norm.state.values() if weight.norm is not None else ()
    return tuple(dict.fromkeys(node for node in (*weight.roots, *biases, *state) if node is not None))


def pointwise_reader_of(weight: Weight) -> fx.Node | None:
    """The linear operator that reads the output of a weight's one use through elementwise functions only."""
    use, norm = weight.uses[0], weight.norm
    return pointwise_reader(use.node, use.node if norm is None else norm.output)


def reader_of(weight: Weight, weights: Sequence[Weight]) -> fx.Node | None:
    """The operator that alone reads the output of a weight's one use, or the hidden units that it is a part of."""
    reader = pointwise_reader_of(weight)
    if reader is not None:
        return reader
    place = next(k for k, other in enumerate(weights) if other is weight)
    readers = [k for k, producers in hidden_readers(weights).items() if place in producers]
    return weights[readers[0]].uses[0].node if readers else None


def hidden_readers(weights: Sequence[Weight]) -> dict[int, tuple[int, ...]]:
    """Place of a weight -> places of those whose outputs are, by elementwise functions, the hidden units that it
    reads.
    """
    single = {k: w.uses[0] for k, w in enumerate(weights) if len(w.uses) == 1 and not w.form.kind.is_conv}
    free = {k: use for k, use in single.items() if weights[k].norm is None and takes_any_order(use)}
    outputs = {use.node: k for k, use in free.items()}
    found = {k: hidden_sources(use.node, outputs) for k, use in single.items()}
    return {k: producers for k, producers in found.items() if producers}


def takes_any_order(use: Use) -> bool:
    """Whether everything that is added to the outputs can be put in another order."""
    return use.rest is None and (use.bias is None or use.root_bias is not None)


def rewrite(
    captured: Captured, weights: Sequence[Weight], cuts: Mapping[int, Cut], kernels: Kernels | None = None
) -> Rewritten:
    """A copy of a graph with the cuts at its weights, ``kernels`` where there are any in place of operators. Raises
    VerificationError where the graph reads a weight in another way than the cut was made for.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(captured.module.graph, copies))
    constants: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    last = [copies[captured.placeholders[-1]]] if captured.placeholders else []
    emitter = Emitter(graph, lambda name, tensor: _placeholder(graph, constants, paths, last, name, tensor), kernels)
    baked: dict[fx.Node, None] = {}
    replaced = 0
    for weight in weights:
        cut = cuts.get(id(weight.tensor))
        if cut is None:
            continue
        _check_read_alike(cut, weight, weights)
        for use in weight.uses:
            norm = _moved_norm(weight, copies)
            emitter.replace(_moved(use, copies), norm, cut.new, cut.name, cut.lead, cut.bias)
        state = weight.norm.state.values() if weight.norm is not None else ()
        biases = [use.root_bias for use in weight.uses if cut.bias is not None]
        baked |= dict.fromkeys(node for node in (*weight.roots, *biases, *state) if node is not None)
        replaced += 1
    left = set(graph.nodes)
    had = [copies[node] for node in captured.module.graph.nodes if node.op == "call_function" and node.users]
    for node in reversed(had):  # views of weights that nothing reads any more
        if node in left and not node.users and not node.is_impure():
            graph.erase_node(node)
    kept = [k for k, node in enumerate(captured.placeholders) if copies[node].users or node in captured.inputs]
    for k, node in enumerate(captured.placeholders):
        if k not in kept:
            graph.erase_node(copies[node])
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return Rewritten(fx.GraphModule(captured.module, graph), tuple(kept), constants, replaced, tuple(baked), paths)


def _check_read_alike(cut: Cut, weight: Weight, weights: Sequence[Weight]) -> None:
    how = (weight.form, weight.norm is not None, len(weight.uses) == 1)
    if how != (cut.form, cut.norm, cut.single):
        raise VerificationError(f"this graph reads {cut.name} in another way than the one that was planned")
    if cut.new.output_order is not None:
        reader = reader_of(weight, weights)
        behind = next((w for w in weights if w.uses[0].node is reader), None)
        if behind is None or id(behind.tensor) not in (cut.reader or ()):
            raise VerificationError(f"this graph reads the output of {cut.name} elsewhere: its order cannot change")


def _placeholder(
    graph: fx.Graph, constants: dict[str, Tensor], paths: dict[str, str], last: list[fx.Node], name: str, tensor: Tensor
) -> fx.Node:
    """A new placeholder behind all others."""
    place = graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes)))
    with place:
        node = graph.placeholder("tdc_" + name.replace(".", "_"))
    constants[node.name], paths[node.name] = tensor, name
    last[:] = [node]
    return node


def _moved(use: Use, copies: Mapping[fx.Node, fx.Node]) -> Use:
    """A use in a copy of its graph, as far as it was rewritten already."""
    node = copies[use.node]
    place = {a: k for k, a in enumerate(use.node.args) if isinstance(a, fx.Node)}

    def now(old: fx.Node | None) -> Any:
        return None if old is None else node.args[place[old]]

    return replace(use, node=node, activation=now(use.activation), bias=now(use.bias), rest=now(use.rest))


def _moved_norm(weight: Weight, copies: Mapping[fx.Node, fx.Node]) -> Any:
    norm = weight.norm
    return None if norm is None else replace(norm, node=copies[norm.node], output=copies[norm.output])
