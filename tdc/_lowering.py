"""Handing graphs on to a compiler: Inductor, AOTAutograd or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .frontends.fx.captured import Captured
from .frontends.fx.normalise import fake_mode
from .frontends.fx.rewrite import Rewritten

__all__ = ["INNER", "Call", "Lowering", "lower_given"]

INNER = ("inductor", "aot_eager", "eager")
Call = Callable[..., Any]
_ROUNDS = 5
_FROZEN_GAIN = 0.97
"""Freezing must be that much faster to be taken: it costs memory, and the weights cannot change in it."""


def lower_given(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, mode: str | None) -> Call:
    """The graph that Dynamo gave, as that compiler would run it without TDC."""
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    made: Any = compile_fx(gm, list(example_inputs), config_patches=_patches(mode))
    return made


def _patches(mode: str | None) -> dict[str, Any] | None:
    if mode is None:
        return None
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


@dataclass(frozen=True)
class Lowering:
    """How graphs that TDC made are compiled. ``freezing``: auto (measured), on, off."""

    inner: str = "inductor"
    mode: str | None = None
    freezing: str = "auto"

    def lower(self, captured: Captured, new: Rewritten, given: Sequence[Any], *, late: bool) -> tuple[Call, bool]:
        """(a function of the old graph's arguments and the new constants, whether it has old constants frozen in).

        ``given``: arguments of the old graph. ``late``: outside of Dynamo's compilation, so that no guard can be added
        any more; where the compiler assumes something new about sizes, it is checked on every call, and the graph is
        run as it is where it does not hold.
        """
        module = new.module
        if self.inner == "eager":
            return module.forward, False
        placeholders = [captured.placeholders[k] for k in new.kept]
        mode = fake_mode([node.meta.get("val") for node in captured.placeholders])
        fakes = [node.meta["val"] for node in placeholders]
        fakes += [mode.from_tensor(tensor, static_shapes=True) for tensor in new.constants.values()]
        with _apart(captured, mode, late=late) as guards:
            plain = self._compile(module, fakes, freeze=False)
        call = _guarded(plain, module, guards(), fakes)
        if self.inner != "inductor" or self.freezing == "off" or torch.is_grad_enabled():
            return call, False
        held = {k: given[old] for k, old in enumerate(new.kept) if captured.placeholders[old] in captured.names}
        held |= {len(new.kept) + k: tensor for k, tensor in enumerate(new.constants.values())}
        try:
            with _apart(captured, mode, late=late) as guards:
                free = [fake for k, fake in enumerate(fakes) if k not in held]
                inner = self._compile(_frozen(module, held), free, freeze=True)
            places = [k for k in range(len(fakes)) if k not in held]
            frozen = _guarded(lambda *args: inner(*(args[k] for k in places)), module, guards(), fakes)
        except Exception:
            if self.freezing == "on":
                raise
            return call, False
        examples = [*(given[k] for k in new.kept), *new.constants.values()]
        if self.freezing == "on" or _is_faster(frozen, call, examples, captured):
            return frozen, True
        return call, False

    def _compile(self, module: fx.GraphModule, fakes: Sequence[Any], *, freeze: bool) -> Call:
        copy = fx.GraphModule(module, _copied(module.graph))
        if self.inner == "aot_eager":
            from torch._dynamo.backends.debugging import aot_eager

            return aot_eager(copy, list(fakes))
        from torch._inductor.compile_fx import compile_fx

        patches = {**(_patches(self.mode) or {}), **({"freezing": True} if freeze else {})}
        made: Any = compile_fx(copy, list(fakes), config_patches=patches or None)
        return made


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def _frozen(module: fx.GraphModule, held: Mapping[int, Tensor]) -> fx.GraphModule:
    """The graph with some of its placeholders as attributes that it holds."""
    new = fx.GraphModule(module, _copied(module.graph))
    for k, node in enumerate(new.graph.find_nodes(op="placeholder")):
        if k in held:
            name = f"tdc_held_{k}"
            tensor = held[k].detach()
            if tensor.is_floating_point():
                new.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                new.register_buffer(name, tensor)
            with new.graph.inserting_before(node):
                own = new.graph.get_attr(name)
            node.replace_all_uses_with(own)
            new.graph.erase_node(node)
    # Attributes may stand between placeholders, which must come first.
    first = next(n for n in new.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in new.graph.find_nodes(op="get_attr"):
        first.prepend(node)
    new.recompile()
    return new


Guards = tuple[Any, tuple[Any, ...]]


@contextmanager
def _apart(captured: Captured, mode: Any, *, late: bool) -> Iterator[Callable[[], Guards | None]]:
    """Inside, a compilation of its own with Dynamo's fake tensors. Gives the guards that it added, if it comes late."""
    from torch._dynamo.convert_frame import compile_lock
    from torch._guards import TracingContext, tracing

    env = mode.shape_env
    added: list[Any] = []
    before = len(env.guards) if env is not None else 0

    def guards() -> Guards | None:
        return (env, tuple(added)) if added else None

    with compile_lock if late else nullcontext(), _calls_go_on() if late else nullcontext():
        frozen = env.frozen if env is not None else False
        if late and env is not None:
            env.frozen = False
        try:
            with tracing(TracingContext(mode)), torch.no_grad(), captured.context():
                yield guards
        finally:
            if late and env is not None:
                added += env.guards[before:]
                env.frozen = frozen


@contextmanager
def _calls_go_on() -> Iterator[None]:
    """Inside, other threads may call compiled models while this one traces: a flag of the tracer that is meant for the
    tracing thread is seen by all, and Dynamo refuses calls by it. Dynamo's settings are each thread's own, but for
    their defaults.
    """
    setting = vars(torch._dynamo.config)["_config"]["force_compile_during_fx_trace"]
    before, setting.default = setting.default, True
    try:
        yield
    finally:
        setting.default = before


def _guarded(call: Call, module: fx.GraphModule, guards: Guards | None, fakes: Sequence[Any]) -> Call:
    """The call where the guards hold, and the graph itself where they do not."""
    if guards is None:
        return call
    env, added = guards
    places = [k for k, fake in enumerate(fakes) if isinstance(fake, torch.SymInt)]
    text = env.produce_guards_expression(placeholders=[fakes[k] for k in places], guards=list(added))
    if text is None:
        return call
    known: dict[tuple[Any, ...], bool] = {}

    def checked(*args: Any) -> Any:
        sizes = tuple(args[k] for k in places)
        if sizes not in known:
            known[sizes] = bool(env.evaluate_guards_expression(text, list(sizes)))
        return call(*args) if known[sizes] else module(*args)

    return checked


def _is_faster(first: Call, second: Call, examples: Sequence[Any], captured: Captured) -> bool:
    """By the least time of interleaved runs; False where the graph writes to its inputs, so that it cannot be tried."""
    if captured.written or any(isinstance(value, torch.SymInt) for value in examples):
        return False
    taken: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad(), captured.context():
        for lap in range(2 + _ROUNDS):
            for k, call in enumerate((first, second)):
                start = time.perf_counter()
                call(*examples)
                if lap >= 2:
                    taken[k].append(time.perf_counter() - start)
    return min(taken[0]) < _FROZEN_GAIN * min(taken[1])
