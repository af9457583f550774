"""Runs that begin late: what the first parts of a module have given before is not worked out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .running import hooks, pre_hooks

__all__ = ["Prefix", "prefixes"]

_BYTES = 512 << 20
"""That what the parts of a model gave, in all runs, may take."""


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The entries of all sequences and lists of modules, the innermost ones that follow each other directly."""
    found: list[nn.Module] = []
    is_row = isinstance(module, (nn.Sequential, nn.ModuleList))
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) or not is_row:
            found += parts_of(child)
        else:
            found.append(child)
    return found


@dataclass(frozen=True)
class Prefix:
    """What the parts of a module gave for one batch, in the order in which they ended, and how many had ended when each
    of some modules, all of which run once, began.
    """

    parts: list[tuple[nn.Module, Any]]
    ended: Mapping[nn.Module, int]
    size: int
    """Bytes that the outputs of the parts take."""

    @classmethod
    def of(
        cls, model: nn.Module, watched: Iterable[nn.Module], run: Callable[[], dict[str, Tensor]], room: int
    ) -> Prefix | None:
        """None where the outputs of the parts take more than ``room`` bytes, or where runs that begin late do not give
        the same: where the parts give more than their outputs, say.
        """
        wanted = dict.fromkeys(p for p in parts_of(model) if not isinstance(p, torch.jit.ScriptModule))
        wanted = {part: None for part in wanted if not part._forward_hooks}  # a hook would run once more
        ended, runs, size = list[tuple[nn.Module, Any]](), dict[nn.Module, list[int]](), 0

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            runs.setdefault(module, []).append(len(ended))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal size
            size += sum(t.numel() * t.element_size() for t in _tensors(output))
            if size <= room:
                ended.append((module, _copied(output)))

        with pre_hooks({*watched, *wanted}, begin), hooks(wanted, end):
            expected = run()
        if not ended or size > room or any(len(runs[module]) > 1 for module, _ in ended):
            return None
        made = cls(ended, {module: places[0] for module, places in runs.items() if len(places) == 1}, size)
        for count in (len(ended), len(ended) // 2, len(ended)):
            with made.skipping(count):
                found = run()
            if found.keys() != expected.keys() or not all(torch.equal(found[k], expected[k]) for k in expected):
                return None
        return made

    def before(self, modules: Iterable[nn.Module]) -> int:
        """How many parts had ended when the first of the modules began; 0 where that is not known."""
        return min((self.ended.get(module, 0) for module in modules), default=0)

    @contextmanager
    def skipping(self, count: int) -> Iterator[None]:
        """The first parts give what they gave. The last of them gives a copy, which what follows may write to; where it
        has written to something else, nothing is known any more.
        """
        given = self.parts[:count]
        own = [module.__dict__.get("forward") for module, _ in given]
        versions = _versions(given)
        try:
            for place, (module, output) in enumerate(given, 1):
                module.__dict__["forward"] = _giving(output, copied=place == count)
            yield
        finally:
            for (module, _), forward in zip(given, own, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            if versions != _versions(given):
                self.parts.clear()


def _giving(output: Any, *, copied: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _copied(output) if copied else output

    return forward


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _versions(parts: Iterable[tuple[nn.Module, Any]]) -> list[int]:
    return [-1 if t.is_inference() else t._version for _, output in parts for t in _tensors(output)]


def _copied(output: Any) -> Any:
    return _pytree.tree_map_only(Tensor, torch.clone, output)


def prefixes(
    model: nn.Module, watched: Iterable[nn.Module], runs: Mapping[int, Callable[[], dict[str, Tensor]]]
) -> dict[int, Prefix]:
    """Of several runs, by their keys, where they can be had."""
    found, room, modules = dict[int, Prefix](), _BYTES, set(watched)
    for key, run in runs.items():
        made = Prefix.of(model, modules, run, room)
        if made is not None:
            found[key] = made
            room -= made.size
    return found
