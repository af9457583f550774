"""Residual connections: what the outputs of layers are added to, found in the calls of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Connections", "Kept"]

_ADDS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])
_HANDS_ON = frozenset(["dropout", "view", "reshape", "contiguous", "to", "clone", "flatten", "unflatten"])

Call = tuple[int, str]
"""Place of a call among all calls of a run to functions of tensors, and its name."""


class Connections(TorchFunctionMode):
    """Watches one run. ``found``: site -> the call that made what the site's output is added to, where that is all that
    is done with the output, and that call was before the site's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> Call
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> site
        self._entered: dict[int, int] = {}
        self._added: dict[int, Call] = {}
        self._other: set[int] = set()

    @property
    def found(self) -> dict[int, Call]:
        return {site: call for site, call in self._added.items() if site not in self._other}

    def enter(self, site: int) -> None:
        self._entered[site] = self._calls

    def leave(self, site: int, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs[output] = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if made:  # sizes and the like are no use of a tensor
            self._note(_name(func), [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)], kwargs, made)
        for value in made:
            self._made[value] = (self._calls, _name(func))
        self._calls += 1
        return result

    def _note(self, name: str, given: list[Tensor], kwargs: Any, made: list[Tensor]) -> None:
        for value in given:
            site = self._outputs.get(value)
            if site is None:
                continue
            others = [other for other in given if other is not value]
            origin = self._made.get(others[0]) if len(others) == 1 else None
            if name in _HANDS_ON and len(made) == 1:
                self._outputs[made[0]] = site
            elif name in _ADDS and origin and not kwargs and site not in self._added and len(given) == 2:
                if origin[0] < self._entered.get(site, 0) and others[0].shape == value.shape:
                    self._added[site] = origin
            else:
                self._other.add(site)


class Kept(TorchFunctionMode):
    """In a run like the one that was watched: keeps what some calls make until the last of their sites has asked."""

    def __init__(self, found: Mapping[int, Call]) -> None:
        super().__init__()
        self._calls = 0
        self._call = dict(found)
        self._held: dict[Call, Tensor] = {}
        self._apart = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is called inside does not belong to the run."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def beside(self, site: int) -> Tensor | None:
        """What the output of the site will be added to, if it is known."""
        call = self._call.pop(site, None)
        if call is None:
            return None
        return self._held.get(call) if call in self._call.values() else self._held.pop(call, None)

    def exchange(self, made: Any, new: Any) -> None:
        """A call's result was replaced by something else, which the run goes on with."""
        self._held = {call: new if value is made else value for call, value in self._held.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._apart:
            return result
        call = (self._calls, _name(func))
        if isinstance(result, Tensor) and call in self._call.values():
            self._held[call] = result
        self._calls += 1
        return result


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))
