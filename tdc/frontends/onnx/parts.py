"""Runs of a model in parts, from one site to the next: what enters a site is seen before it runs, and its weight can
change then.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import ModelError
from ...ir import Site
from ..lockstep import Meet
from ..program import Change
from .calibration import Batch
from .running import with_weight_inputs
from .runtime import Session, first_line, ort_errors
from .tensors import entries_of, stored, to_torch
from .uses import Match, Use

__all__ = ["Parts"]

_HAND_ON = frozenset({"Dropout", "Identity"})
_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class _Stop:
    """A use of a site: the place of its operator, what enters it, and what its output is added to."""

    site: Site
    use: Use
    place: int
    activation: ir.Value
    beside: ir.Value | None

    @property
    def names(self) -> set[str]:
        return {value.name or "" for value in (self.activation, self.beside) if value is not None}

    def tensors(self, values: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        beside = None if self.beside is None else to_torch(entries_of(self.beside, values))
        return self.use.oriented(entries_of(self.activation, values)), beside


class Parts:
    """The operators between the uses of ``sites``, each stretch of them in a session of its own, one at a time: of the
    runs that go on side by side all must be through with one stretch before any comes to the next but one.
    """

    def __init__(self, model: ir.Model, matches: Sequence[Match], sites: Iterable[Site]) -> None:
        self.model, fed = with_weight_inputs(model, matches)
        self.fed = {entry.name: entry for entry in fed}
        graph = self.model.graph
        self._constants = {node.outputs[0].name: node for node in graph if _is_constant(node)}
        self._nodes = [node for node in graph if not _is_constant(node)]
        self._made = {value.name or "": (k, value) for k, node in enumerate(self._nodes) for value in node.outputs}
        """Of each value that is computed, the place of its operator."""
        self._stops = sorted(self._found(matches, {site.order for site in sites}), key=lambda stop: stop.place)
        self._session: tuple[int, Session, tuple[str, ...], tuple[str, ...]] | None = None
        self._needed = self._needed_behind()

    def _found(self, matches: Sequence[Match], wanted: set[int]) -> Iterator[_Stop]:
        uses = {order: iter(match.uses) for order, match in enumerate(matches)}
        for place, node in enumerate(self._nodes):
            entries = [self.fed[value.name] for value in node.inputs if value is not None and value.name in self.fed]
            weight = next((entry for entry in entries if entry.exact is None), None)
            if weight is None:
                continue
            use = next(uses[weight.order])
            if weight.order in wanted:
                reader = node if use.pad is None else node.inputs[0].producer()  # type: ignore[union-attr]
                assert reader is not None
                activation = reader.inputs[use.form.data if use.pad is None else 0]
                assert activation is not None
                beside = _added_to(node.outputs[0], use, self.fed)
                known = beside is not None and self._made.get(beside.name or "", (-1, beside))[0] < place
                yield _Stop(matches[weight.order].site, use, place, activation, beside if known else None)

    def _needed_behind(self) -> list[set[str]]:
        """Of each stop, the names that are read there or further on."""
        needed: set[str] = set()
        found = []
        end = self._stops[-1].place if self._stops else 0
        for stop in reversed(self._stops):
            needed |= {name for node in self._nodes[stop.place : end] for name in _read(node)} | stop.names
            end = stop.place
            found.append(set(needed))
        return found[::-1]

    def run(self, batch: Batch, changing: bool, meet: Meet) -> None:
        """From site to site to the last one; of a changing run the changes that ``meet`` returns hold from there on."""
        values: dict[str, Any] = dict(batch)
        changes: dict[int, Change] = {}
        start = 0
        for k, stop in enumerate(self._stops):
            values = self._stretch(k, start, values, changes)
            start = stop.place
            answer = meet(stop.site, *stop.tensors(values))
            if changing and answer is not None:
                changes[stop.site.order] = answer

    def _stretch(self, k: int, start: int, values: dict[str, Any], changes: Mapping[int, Change]) -> dict[str, Any]:
        """What is known and still needed behind the operators from ``start`` to a stop."""
        nodes = self._nodes[start : self._stops[k].place]
        made: dict[str, Any] = {}
        if any(value.name in self._needed[k] for node in nodes for value in node.outputs):
            if self._session is None or self._session[0] != k:
                self._session = self._opened(k, nodes, values)
            _, session, reads, gives = self._session
            weights = {n: self.fed[n].value(changes.get(self.fed[n].order)) for n in reads if n in self.fed}
            feeds = weights | {name: values[name] for name in reads if name in values}
            try:
                made = dict(zip(gives, session.run(gives, feeds), strict=True))
            except ort_errors() as error:
                raise ModelError(first_line(error)) from error
        if odd := [name for name, value in made.items() if not isinstance(value, np.ndarray)]:
            raise ModelError(f"{odd[0]} is no tensor")
        return {name: value for name, value in (values | made).items() if name in self._needed[k]}

    def _opened(
        self, k: int, nodes: Sequence[ir.Node], known: Mapping[str, Any]
    ) -> tuple[int, Session, tuple[str, ...], tuple[str, ...]]:
        graph = self.model.graph
        read = {name for node in nodes for name in _read(node)}
        own = [self._constants[name] for name in sorted(read & self._constants.keys())]
        produced = [value for node in nodes for value in node.outputs if value.name in self._needed[k]]
        entering = [self._made[name][1] for name in sorted(read & known.keys() & self._made.keys())]
        for value in entering:
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(known[value.name or ""].dtype)), None
        given = [value for value in graph.inputs if value.name in read]
        view = ir.GraphView(
            [*given, *entering],
            produced,
            nodes=[*own, *nodes],
            initializers=[value for name, value in graph.initializers.items() if name in read],
            opset_imports=graph.opset_imports,
            name="part",
        )
        part = ir.Model(view.clone(), ir_version=self.model.ir_version, functions=list(self.model.functions.values()))
        reads = tuple(value.name or "" for value in part.graph.inputs)
        return k, Session(part), reads, tuple(value.name or "" for value in produced)


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain == ""


def _read(node: ir.Node) -> Iterator[str]:
    """The names that an operator reads, those in the bodies of an If, Loop or Scan too."""
    yield from (value.name for value in node.inputs if value is not None and value.name)
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            for graph in [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value:
                yield from (name for inner in graph for name in _read(inner))
                yield from (value.name for value in graph.outputs if value.name)


def _added_to(value: ir.Value, use: Use, fed: Container[str]) -> ir.Value | None:
    """What the output of a use is added to, behind its bias, where that is all that is done with it."""
    passing = _HAND_ON if use.form.kind.is_conv else _HAND_ON | _RESHAPES
    if not use.form.kind.is_conv and not use.form.output_last:
        return None
    while not value.is_graph_output():
        readers = tuple(value.uses())
        if len(readers) != 1 or readers[0].node.domain != "":
            return None
        node = readers[0].node
        if node.op_type == "Add":
            (other,) = (entry for k, entry in enumerate(node.inputs) if k != readers[0].idx)
            if other is None or (other.name not in fed and stored(other) is None):
                return other
        elif node.op_type not in passing or readers[0].idx != 0:
            return None
        value = node.outputs[0]
    return None
