"""ATen graphs with the tensors that are constant in them, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import CalibrationError
from ..graph import BATCH_NORMS, floating_outputs, operator

__all__ = ["Bound", "Captured", "Override", "Values", "alongside", "passes_on", "undisturbed"]

Values = tuple[Any, ...]
"""Arguments of a graph in the order of those placeholders that are not constants."""

Override = Callable[[tuple[Any, ...]], Any]
"""Takes the arguments of a node, gives what the node shall give; NotImplemented for what it gives by itself."""
Watch = Callable[[Any], None]


def _flat(batch: Any) -> Values:
    if not isinstance(batch, (tuple, list)):
        raise CalibrationError(f"a batch must be a tuple of the graph's inputs; got {type(batch).__name__}")
    return tuple(batch)


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph of pre-dispatch ATen operators.

    ``names`` has the qualified names of every constant: a placeholder that the model holds (a weight, a buffer), or a
    ``get_attr``. ``read`` turns a user's batch into the values of the other placeholders, which the model's code calls
    ``arguments``; ``label`` names what the graph returns; ``context`` is entered around every run.
    """

    module: fx.GraphModule
    names: Mapping[fx.Node, tuple[str, ...]]
    read: Callable[[Any], Values] = _flat
    label: Callable[[Any], Mapping[str, Tensor]] = floating_outputs
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    arguments: tuple[str, ...] = ()

    @cached_property
    def placeholders(self) -> tuple[fx.Node, ...]:
        return tuple(self.module.graph.find_nodes(op="placeholder"))

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.placeholders if node not in self.names)

    @cached_property
    def positions(self) -> dict[fx.Node, int]:
        return {node: k for k, node in enumerate(self.module.graph.nodes)}

    @cached_property
    def written(self) -> frozenset[fx.Node]:
        """Placeholders whose memory the graph writes to (a cache, the running mean of a normalisation in training)."""
        found = set()
        for node in self.module.graph.nodes:
            found |= {_owner(argument) for argument in _written(node)}
        return frozenset(node for node in found if node.op in ("placeholder", "get_attr"))

    @cached_property
    def sizes(self) -> dict[fx.Node, tuple[int, int]]:
        """Symbolic size among the inputs -> (place of a tensor among them, axis) that has it."""
        known: dict[str, tuple[int, int]] = {}
        for k, node in enumerate(self.inputs):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        known.setdefault(str(size), (k, axis))
        symbols = {n: str(n.meta.get("val")) for n in self.inputs if isinstance(n.meta.get("val"), torch.SymInt)}
        return {node: known[symbol] for node, symbol in symbols.items() if symbol in known}


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for declared, given in zip(schema.arguments, node.args, strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write:
            yield from (a for a in (given if isinstance(given, (tuple, list)) else [given]) if isinstance(a, fx.Node))
    if operator(node) == "batch_norm" and node.args[5]:
        yield from (a for a in node.args[3:5] if isinstance(a, fx.Node))


def _owner(node: fx.Node) -> fx.Node:
    """The value whose memory a view shows."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        views = schema is not None and any(a.alias_info is not None for a in schema.arguments[:1])
        if not views or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


@dataclass(frozen=True, eq=False)
class Bound:
    """A captured graph with its constants. Everything leaves them, and what is given, as it was."""

    captured: Captured
    tensors: Mapping[fx.Node, Tensor] = field(repr=False)

    def run(
        self,
        values: Values,
        taps: Mapping[fx.Node, Sequence[Watch]] | None = None,
        changes: Mapping[fx.Node, Override] | None = None,
        marks: Mapping[fx.Node, Override] | None = None,
        after: Callable[[Any], Any] = lambda output: output,
        beside: Mapping[fx.Node, fx.Node] | None = None,
    ) -> Any:
        """What ``after`` makes of the output of the graph. ``taps``: called with the arguments of a node before the
        node runs. ``changes``: called with them too, and with the value of another node behind them for those of
        ``beside``. ``marks``: take what a node gives, and give what it shall give; with them gradients are recorded.

        Raises CalibrationError if the graph cannot run.
        """
        given = dict(zip(self.captured.inputs, values, strict=True))
        try:
            given, fewer = self._fitting(given)
            arguments = [self._argument(node, given) for node in self.captured.placeholders]
            own = {node: self._copy_of(node) for node in self.captured.written if node.op == "get_attr"}
            runner = _Runner(self.captured.module, taps or {}, {**own, **(changes or {})}, marks or {}, beside or {})
            with undisturbed(gradients=marks is not None), self.captured.context():
                return after(fewer(runner.run(*arguments, enable_io_processing=False)))
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise CalibrationError(f"the graph cannot run on a batch: {type(error).__name__}: {first}") from error

    def outputs(self, values: Values, changes: Mapping[fx.Node, Override]) -> Mapping[str, Tensor]:
        return self.captured.label(self.run(values, changes=changes))

    def repeated(self, values: Values) -> Callable[[], Any]:
        """Runs the graph on the same values each time, without what :meth:`run` does around it: to be called inside
        :func:`undisturbed`, which takes its time.
        """
        if any(node.op == "get_attr" for node in self.captured.written):
            return lambda: self.run(values)
        given = self._fitting(dict(zip(self.captured.inputs, values, strict=True)))[0]
        arguments = [self._argument(node, given) for node in self.captured.placeholders]

        def run() -> Any:
            with self.captured.context():
                return self.captured.module.forward(*arguments)

        return run

    def _copy_of(self, node: fx.Node) -> Override:
        return lambda args: self.tensors[node].clone()

    def _argument(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        value = self.tensors[node] if node in self.tensors else given[node]
        if isinstance(value, Tensor):
            value = value.clone() if node in self.captured.written or value.is_inference() else value.detach()
        return value

    def _fitting(self, given: dict[fx.Node, Any]) -> tuple[dict[fx.Node, Any], Callable[[Any], Any]]:
        """The inputs with sizes that agree. A graph of one fixed batch size runs on fewer examples by repeating them;
        the surplus of its outputs is cut off.
        """
        tensors = [given[node] for node in self.captured.inputs]
        given = dict(given)
        for node, (place, axis) in self.captured.sizes.items():
            given[node] = int(tensors[place].shape[axis])
        first = next((n for n in self.captured.inputs if isinstance(n.meta.get("val"), Tensor)), None)
        if first is None or first.meta["val"].ndim == 0 or isinstance(first.meta["val"].shape[0], torch.SymInt):
            return given, lambda output: output
        whole, found = int(first.meta["val"].shape[0]), int(given[first].shape[0])
        if not 0 < found < whole:
            return given, lambda output: output
        index = torch.arange(whole) % found
        for node in self.captured.inputs:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == whole:
                given[node] = given[node].index_select(0, index.to(given[node].device))

        def cut(entry: Any) -> Any:
            whole_batch = isinstance(entry, Tensor) and entry.ndim and entry.shape[0] == whole
            return entry[:found] if whole_batch else entry

        return given, lambda output: torch.utils._pytree.tree_map(cut, output)


class _Runner(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        taps: Mapping[fx.Node, Sequence[Watch]],
        changes: Mapping[fx.Node, Override],
        marks: Mapping[fx.Node, Override],
        beside: Mapping[fx.Node, fx.Node],
    ) -> None:
        super().__init__(module)
        self.taps, self.changes, self.marks, self.beside = taps, changes, marks, beside

    def run_node(self, n: fx.Node) -> Any:
        result = self._result(n)
        return self.marks[n](result) if n in self.marks else result

    def _result(self, n: fx.Node) -> Any:
        if n not in self.taps and n not in self.changes:
            return super().run_node(n)
        args = self.fetch_args_kwargs_from_env(n)[0]
        for watch in self.taps.get(n, ()):
            watch(args)
        if n in self.changes:
            result = self.changes[n]((*args, self.env[self.beside[n]]) if n in self.beside else args)
            return super().run_node(n) if result is NotImplemented else result
        return super().run_node(n)


_alongside = ContextVar("alongside", default=False)


@contextmanager
def alongside() -> Iterator[None]:
    """For a thread beside those that run and compile models: what all threads have in common stays as it is."""
    token = _alongside.set(True)
    try:
        yield
    finally:
        _alongside.reset(token)


@contextmanager
def undisturbed(*, gradients: bool = False) -> Iterator[None]:
    """Plain torch inside: no gradients unless they are wanted, no modes of whoever traces, and fixed random numbers
    that leave no trace.

    :func:`alongside` others, random numbers are drawn from what they draw from, and modes are theirs: torch has one
    generator for all threads, and one stack of pre-dispatch modes.
    """
    if _alongside.get():
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    recorded = torch.enable_grad() if gradients else torch.no_grad()
    with _disable_current_modes(), torch.inference_mode(False), recorded, torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def passes_on(node: fx.Node) -> Override:
    """In place of a normalisation that is folded into the layer before it."""
    tuples = operator(node) in BATCH_NORMS - {"batch_norm"}
    return lambda args: (args[0], None, None) if tuples else args[0]
