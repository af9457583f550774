"""Parts of models that one decision is for: gathering calls, planning in the background, fitting again, releasing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _background
from ._fits import Stamp, stamp_of
from ._planning import Outcome, decide, refit
from ._settings import Settings, log
from .errors import ModelError
from .frontends.fx.captured import alongside

if TYPE_CHECKING:
    from ._compiled import Instance

__all__ = ["Part", "keep", "part_of", "parts"]

_OFTEN = 3
"""Refits after which it is told that weights keep changing."""


class Part:
    """Some weights of one model, whichever graphs read them: recompilations for other shapes share it.

    ``state``: new, gathering (calls are kept), planning, compressed, dense (nothing was gained), or failed (dense
    because of ``error``).
    """

    def __init__(self, settings: Settings, weights: Sequence[Tensor]) -> None:
        self.settings = settings
        self.state = "gathering" if settings.calibrate_calls else "new"
        self.weights = tuple(weakref.ref(weight) for weight in weights)
        self.instances: weakref.WeakSet[Instance] = weakref.WeakSet()
        self.outcome: Outcome | None = None
        self.error: ModelError | None = None
        self.stamps: dict[int, Stamp] = {}
        self.updates = 0
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._records: list[tuple[Instance, tuple[Any, ...]]] = []
        self._reading = 0
        self._releasing = False
        if not settings.calibrate_calls:
            self.done.set()

    @property
    def lacking(self) -> int:
        """Calls that are to be gathered yet."""
        return self.settings.calibrate_calls - len(self._records) if self.state == "gathering" else 0

    # ---- deciding

    def decide_for(self, instance: Instance, values: tuple[Any, ...]) -> None:
        stamps = _stamps(instance)
        outcome = decide(
            [instance.bound()], self.settings, self.settings.calibration, (0, values), instance.graph.kernels
        )
        self._take(outcome, stamps)

    def record(self, instance: Instance, values: tuple[Any, ...]) -> None:
        """Keep a call; with the last one that is needed, begin to plan in the background."""
        with self._lock:
            if self.state != "gathering":
                return
            self._records.append((instance, values))
            if len(self._records) < self.settings.calibrate_calls:
                return
            self.state = "planning"
        _background.submit(self._plan)

    def _plan(self) -> None:
        """Runs in the background, and does not raise."""
        records, self._records = self._records, []
        try:
            main = records[-1][0]
            order = list(dict.fromkeys((main, *(instance for instance, _ in records))))
            bounds, stamps = [instance.bound() for instance in order], _stamps(main)
            batches = [(order.index(instance), values) for instance, values in records]
            with alongside():
                example = (0, records[-1][1])
                outcome = decide(bounds, self.settings, batches, example, main.graph.kernels, _background.breathe)
            self._take(outcome, stamps)
            given = dict(records)
            for instance in list(self.instances):
                instance.install(late=True, args=instance.arguments(given.get(instance)))
        except BaseException as error:
            self.give_up(error, "planning", strict=False)
            for instance in list(self.instances):
                if instance.is_alive():
                    instance.run_dense()
        finally:
            self.done.set()

    def is_fitted_for(self, instance: Instance) -> bool:
        """Whether the weights are as they were when the factors were fitted."""
        return all(self.stamps.get(key) == stamp for key, stamp in _stamps(instance).items())

    def inherit(self, other: Part) -> None:
        """Take over a decision for other weights, to be fitted to these."""
        if self.outcome is None and other.outcome is not None and self.state in ("new", "gathering"):
            self.outcome, self.state, self._records = other.outcome, other.state, []
            self.done.set()

    def fit_again(self, instance: Instance) -> None:
        """Raises what the passes raise."""
        assert self.outcome is not None
        if any(ref() is not None and not ref().untyped_storage().nbytes() for ref in self.weights):  # type: ignore[union-attr]
            raise ModelError("the weights were released (release_weights=True): their factors cannot be fitted again")
        stamps = _stamps(instance)
        self._take(refit(instance.bound(), self.settings, self.outcome), stamps)
        self.updates += 1
        told = log.warning if self.updates == _OFTEN else log.info
        told("tdc: weights have changed (%d times so far), and their factors were fitted again", self.updates)

    def refresh(self) -> None:
        """Fit again from the weights as they are. Raises ModelError if that cannot be."""
        if self.outcome is None or not self.outcome.cuts:
            return
        alive = [instance for instance in self.instances if instance.is_alive()]
        if alive:
            self.fit_again(alive[0])
        for instance in alive:
            instance.install(late=True, args=instance.arguments(None))

    def _take(self, outcome: Outcome, stamps: dict[int, Stamp]) -> None:
        self.outcome, self.stamps, self.error = outcome, {**self.stamps, **stamps}, None
        self.state = "compressed" if outcome.cuts else "dense"

    def give_up(self, error: BaseException, what: str, *, strict: bool | None = None) -> None:
        """Stay dense, and say why; with ``strict``, raise."""
        # Without its traceback, whose frames hold the weights.
        self.state, self.error = "failed", ModelError(f"{type(error).__name__}: {error}")
        if self.settings.strict if strict is None else strict:
            raise error
        log.warning("tdc: %s failed, it stays dense. %s: %s", what, type(error).__name__, error)

    # ---- memory

    def release(self) -> None:
        """Free the memory of replaced weights that no graph of any model needs: after the calls that read them."""
        with self._lock:
            self._releasing = True
            if not self._reading:
                self._release()

    @contextmanager
    def reading_weights(self) -> Iterator[None]:
        """Inside, no weight is freed."""
        with self._lock:
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                if self._releasing and not self._reading:
                    self._release()

    def _release(self) -> None:
        self._releasing = False
        needed = {key for part in parts() for instance in part.instances for key in instance.needs}
        cut = self.outcome.cuts if self.outcome is not None else {}
        freed = [t for ref in self.weights if (t := ref()) is not None and id(t) in cut and id(t) not in needed]
        freed = [t for t in freed if t.untyped_storage().nbytes()]
        if not freed:
            return
        _forbid_use(freed)
        for tensor in freed:
            _empty(tensor)
        stamps = {id(tensor): stamp_of(tensor) for tensor in freed}
        self.stamps |= stamps
        for instance in self.instances:
            instance.expect(stamps)


def _stamps(instance: Instance) -> dict[int, Stamp]:
    held = instance.constants()
    return {id(held[k]): stamp_of(held[k]) for k in instance.graph.watched}


def _empty(tensor: Tensor) -> None:
    """Leave the tensor its sizes, which guards look at, and take its memory, which others may have a part of, or which
    may be a mapped file: it gets a storage of its own, without bytes.
    """
    whole = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        tensor.set_(whole)  # type: ignore[call-overload]
    tensor.untyped_storage().resize_(0)


_GONE = (
    "the dense weights of this module were released (release_weights=True): run the compiled model, or compile without "
    "that option to run it eagerly, save or train it"
)


def _forbid_use(tensors: Sequence[Tensor]) -> None:
    """Let modules that hold such a tensor refuse to run eagerly, to give their state, and to be copied and pickled,
    which would crash or write nothing.
    """
    ids = {id(tensor) for tensor in tensors}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and any(
            id(p) in ids for p in thing.__dict__.get("_parameters", {}).values()
        ):
            thing.register_forward_pre_hook(_refuse)
            thing.register_state_dict_pre_hook(_refuse_state)
            thing.__dict__["__deepcopy__"] = thing.__dict__["__reduce_ex__"] = _refuse_copy


def _refuse(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        raise ModelError(_GONE)


def _refuse_copy(how: Any) -> None:
    raise ModelError(_GONE)


def _refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ModelError(_GONE)


_parts: weakref.WeakValueDictionary[tuple[Any, ...], Part] = weakref.WeakValueDictionary()
"""Graphs keep their parts alive."""
_kept: dict[int, Part] = {}


def parts() -> list[Part]:
    """Those that a compiled graph runs, and those that came to nothing, whose weights are alive."""
    return [part for part in list(_parts.values()) if all(ref() is not None for ref in part.weights)]


def part_of(settings: Settings, weights: Sequence[Tensor]) -> Part:
    """The part of these weights under these settings."""
    key = (id(settings), *sorted(id(weight) for weight in weights))
    part = _parts.get(key)
    if part is None or any(ref() is None for ref in part.weights):
        part = _parts[key] = Part(settings, weights)
    return part


def keep(part: Part, weights: Sequence[Tensor]) -> None:
    """Keep a part that no graph runs, for its report, as long as its weights."""
    _kept[id(part)] = part
    for weight in weights:
        weakref.finalize(weight, _kept.pop, id(part), None).atexit = False
