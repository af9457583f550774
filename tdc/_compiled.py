"""What Dynamo calls in place of a graph: dense at first or for good, or with blocks, and never with stale factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ._fits import Stamp, stamp_of
from ._lowering import Call
from ._parts import Part, part_of
from ._settings import Settings
from .errors import ModelError
from .frontends.fx.captured import Bound, Captured, undisturbed
from .frontends.fx.emit import Kernels
from .frontends.fx.match import match
from .frontends.fx.rewrite import Rewritten, rewrite, sources
from .kernels import Match
from .kernels.graphs import GraphKernels

__all__ = ["Graph", "Instance"]

Arguments = Sequence[Any]


@dataclass(frozen=True, eq=False)
class _Active:
    """What an instance runs, and the state of which tensors makes it right: identities, versions and addresses of those
    that ``pick`` takes out of the arguments (None: it is right for any).
    """

    run: Callable[[Arguments], Any]
    pick: Callable[[Arguments], Arguments] | None = None
    keys: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    addresses: tuple[int, ...] = ()
    recording: bool = False


class Graph:
    """A captured graph, called by Dynamo with all its arguments.

    Dynamo's guards do not tell one module from another of the same shapes, so every call looks at the identity of the
    weights: each model has an :class:`Instance` of its own, with its own factors.
    """

    def __init__(self, captured: Captured, settings: Settings, args: Arguments) -> None:
        self.captured, self.settings = captured, settings
        self._dense: Call | None = None
        places = {node: k for k, node in enumerate(captured.placeholders)}
        self.constants = [k for node, k in places.items() if node in captured.names]
        self.inputs = [k for node, k in places.items() if node not in captured.names]
        self.own = {
            node: getattr(captured.module, str(node.target)) for node in captured.names if node.op == "get_attr"
        }
        bound = self.bind({captured.placeholders[k]: args[k] for k in self.constants})
        with undisturbed():
            found = match(bound, values=not any(is_released(args[k]) for k in self.constants))[0]
        self.weights = [replace(weight, tensor=torch.empty(0)) for weight in found]  # the tensors are each model's own
        self.roots = [places[node] for w in self.weights for node in w.roots if node in places]
        self.watched = sorted({places[node] for w in self.weights for node in sources(w) if node in places})
        self._pick = picker(self.watched)
        held = [args[k] for k in self.constants if isinstance(args[k], Tensor)]
        size = sum(t.numel() * t.element_size() for t in (*held, *self.own.values()))
        self._kernels = GraphKernels(convolutions=settings.inner != "inductor", cold=size)
        self._lowered: dict[Any, tuple[Call, bool]] = {}
        self._instances: dict[tuple[int, ...], Instance] = {}
        self._current = self.instance(args)

    @property
    def kernels(self) -> Kernels | None:
        """See :class:`tdc.kernels.graphs.GraphKernels`; None where they are not wanted."""
        return self._kernel if self.settings.kernels == "auto" else None

    def _kernel(self, *what: Any) -> Match | None:
        with undisturbed():
            return self._kernels(*what)

    def use_dense(self, dense: Call) -> None:
        self._dense = dense

    def bind(self, tensors: Mapping[fx.Node, Tensor]) -> Bound:
        return Bound(self.captured, {**tensors, **self.own})

    def __call__(self, *args: Any) -> Any:
        instance = self._current
        if tuple(map(id, self._pick(args))) != instance.ids:
            previous, instance = self._current, self.instance(args)
            self._current = instance
            instance.succeed(previous)
            instance.settle(late=True, args=args)
        active = instance.active
        if active.pick is not None:
            held = active.pick(args)
            same = tuple([t._version for t in held]) == active.versions
            if not same or tuple([t.data_ptr() for t in held]) != active.addresses:
                instance.update(args, active)
                active = instance.active
        elif active.recording:
            instance.record(args)
        return active.run(args)

    def instance(self, args: Arguments) -> Instance:
        """That of these weights. One that is new has decided nothing yet."""
        ids = tuple(map(id, self._pick(args)))
        found = self._instances.get(ids)
        if found is None or not found.is_alive():
            found = self._instances[ids] = Instance(self, args)
            for k in self.watched:
                weakref.finalize(args[k], self._instances.pop, ids, None).atexit = False
        return found

    def dense(self, args: Arguments) -> Any:
        if self._dense is None:
            whole = Rewritten(self.captured.module, tuple(range(len(self.captured.placeholders))), {}, 0, ())
            lowering = replace(self.settings.lowering, freezing="off")
            self._dense = lowering.lower(self.captured, whole, args, late=True)[0]
        return self._dense(*args)

    def lowered(self, new: Rewritten, args: Arguments, *, late: bool, freeze: bool) -> tuple[Call, bool]:
        """Compiled, or as it was compiled for the same graph of other weights."""
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in new.constants.values())
        key = (new.module.code, new.kept, shapes)
        if key in self._lowered:
            return self._lowered[key]
        lowering = self.settings.lowering if freeze else replace(self.settings.lowering, freezing="off")
        made = lowering.lower(self.captured, new, args, late=late)
        if not made[1]:
            self._lowered[key] = made
        return made


class Instance:
    """One graph with the weights of one model."""

    def __init__(self, graph: Graph, args: Arguments) -> None:
        self.graph = graph
        self.ids = tuple(id(args[k]) for k in graph.watched)
        self._constants = [weakref.ref(args[k]) for k in graph.constants]
        self.part: Part = part_of(graph.settings, [args[k] for k in graph.roots])
        self.part.instances.add(self)
        self.needs = frozenset(id(args[k]) for k in graph.constants)
        self.replaced = 0
        self.active = self._running_dense(recording=self.part.state == "gathering")

    # ---- what it holds

    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self._constants)

    def constants(self) -> dict[int, Tensor]:
        """Place among the arguments -> tensor. Raises ModelError if the model is gone."""
        found = dict(zip(self.graph.constants, (ref() for ref in self._constants), strict=True))
        if any(tensor is None for tensor in found.values()):
            raise ModelError("the model that was compiled is gone")
        return found  # type: ignore[return-value]

    def bound(self) -> Bound:
        placeholders = self.graph.captured.placeholders
        return self.graph.bind({placeholders[k]: tensor for k, tensor in self.constants().items()})

    def arguments(self, values: Sequence[Any] | None) -> list[Any]:
        """All arguments, of inputs that were kept; 0 in their place if there are none."""
        given: dict[int, Any] = dict(self.constants())
        given |= dict(zip(self.graph.inputs, values or [0] * len(self.graph.inputs), strict=True))
        return [given[k] for k in range(len(given))]

    def values(self, args: Arguments) -> tuple[Any, ...]:
        return tuple(args[k] for k in self.graph.inputs)

    # ---- what it runs

    def succeed(self, previous: Instance) -> None:
        """Take over what was decided for weights in whose place these came: ``previous`` is gone, or shares some."""
        if not previous.is_alive() or set(previous.ids) & set(self.ids):
            self.part.inherit(previous.part)

    def record(self, args: Arguments) -> None:
        if self.part.state == "gathering":
            self.part.record(self, tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in self.values(args)))

    def settle(self, *, late: bool, args: Arguments) -> None:
        """Decide, if the part has not, and run that from the next call on. Where it fails the graph runs dense, unless
        ``strict``.
        """
        part = self.part
        if part.state in ("gathering", "planning", "failed"):
            return
        try:
            if part.outcome is None:
                part.decide_for(self, self.values(args))
            elif not part.is_fitted_for(self):
                part.fit_again(self)
            self.install(late=late, args=args)
        except Exception as error:
            part.give_up(error, "compressing a graph")
            self.run_dense()

    def install(self, *, late: bool, args: Arguments) -> None:
        """Run what the part has decided from the next call on."""
        outcome, graph = self.part.outcome, self.graph
        if outcome is None or not outcome.cuts:
            return self.run_dense()
        bound = self.bound()
        weights = [replace(w, tensor=bound.tensors[w.roots[0]]) for w in graph.weights]
        new = rewrite(graph.captured, weights, outcome.cuts, graph.kernels)
        if not new.replaced:
            return self.run_dense()
        nodes = graph.captured.placeholders
        known = all(isinstance(args[k], Tensor) or not isinstance(nodes[k].meta["val"], Tensor) for k in graph.inputs)
        call, frozen = graph.lowered(new, args, late=late, freeze=known and not self.part.updates)
        places = {node: k for k, node in enumerate(nodes)}
        baked = graph.constants if frozen else sorted(places[node] for node in new.baked if node in places)
        held = self.constants()
        self.needs, self.replaced = frozenset(id(held[k]) for k in new.kept if k in held), new.replaced
        constants, pick = list(new.constants.values()), picker(new.kept)
        stamps = {id(held[k]): stamp_of(held[k]) if frozen else self.part.stamps[id(held[k])] for k in baked}
        self.active = _Active(
            lambda args: call(*pick(args), *constants),
            picker(baked) if not any(held[k].is_inference() for k in baked) else None,
            tuple(stamps),
            tuple(version for version, _ in stamps.values()),
            tuple(address for _, address in stamps.values()),
        )
        if self.part.settings.release_weights:
            self.part.release()

    def run_dense(self) -> None:
        held = self.constants().values()
        self.needs, self.replaced = frozenset(id(tensor) for tensor in held), 0
        if any(is_released(tensor) for tensor in held):
            self.active = _Active(_raise(ModelError("a replaced weight was released (release_weights=True)")))
        elif self.part.settings.strict and self.part.error is not None:
            self.active = _Active(_raise(self.part.error))
        else:
            self.active = self._running_dense()

    def _running_dense(self, *, recording: bool = False) -> _Active:
        if not self.part.settings.release_weights:
            return _Active(self.graph.dense, recording=recording)

        def dense(args: Arguments) -> Any:
            with self.part.reading_weights():
                if self.active.run is dense:
                    return self.graph.dense(args)
            return self.active.run(args)

        return _Active(dense, recording=recording)

    def expect(self, stamps: Mapping[int, Stamp]) -> None:
        """Take the present state of these tensors for the right one."""
        active = self.active
        known = zip(active.keys, active.versions, active.addresses, strict=True)
        expected = [stamps.get(key, (version, address)) for key, version, address in known]
        self.active = replace(
            active, versions=tuple(version for version, _ in expected), addresses=tuple(a for _, a in expected)
        )

    def update(self, args: Arguments, seen: _Active) -> None:
        """A weight has changed: fit again, or raise, as the options want. ``seen``: what was active then."""
        if self.active is not seen:
            return
        if self.part.settings.on_update == "error" and not self.part.is_fitted_for(self):
            raise ModelError("a weight was changed after its factors were fitted: tdc.refresh(model) fits them again")
        self.settle(late=True, args=args)


def is_released(tensor: Any) -> bool:
    """Whether the memory of a tensor was given back."""
    if not isinstance(tensor, Tensor) or tensor.device.type == "meta" or not tensor.numel():
        return False
    try:
        return not tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a subclass without storage
        return False


def _raise(error: BaseException) -> Callable[[Arguments], Any]:
    def run(args: Arguments) -> Any:
        raise error

    return run


def picker(places: Sequence[int]) -> Callable[[Arguments], Arguments]:
    """Takes entries out of a sequence, as a tuple."""
    places = tuple(places)
    if len(places) == 1:
        return lambda args: (args[places[0]],)
    return itemgetter(*places) if places else lambda args: ()
