"""How far a compressed module is from the dense one between its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .frontends.nn import Factored
from .frontends.nn.attention import opened
from .frontends.nn.running import pre_hooks

__all__ = ["Inside"]

Inputs = Mapping[str, Tensor]

_LEAST = 1e-6
_TINY = 1e-30
_ALIKE = 0.5


class Inside:
    """Compares what factored layers read with what the same layers of the dense model read.

    The error of a layer is ``mean_t |x'_t - x_t|^2 / max(|x_t|^2, mean |x|^2)`` over rows t, the channels of one
    position of one example: rows of far greater values (the first tokens of a text) do not outweigh all others.
    :meth:`weigh` gives each layer the weight with which its error at the start counts as much as any other's. Left out
    are layers whose inputs cannot be compared: with fewer units, units in another order, or half of the variation lost.
    """

    def __init__(self, small: nn.Module, model: nn.Module) -> None:
        with opened(model):
            dense = dict(model.named_modules())
        layers = {path: layer for path, layer in small.named_modules() if isinstance(layer, Factored) and path in dense}
        self._layers = {id(small): layers, id(model): {path: dense[path] for path in layers}}
        self._axes = {path: -1 - len(layer.block.kind.windows) for path, layer in layers.items()}
        self.weights: dict[str, float] = {}

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inputs of one run of either model inside, each tensor once and of each layer the first, by the path of the
        layer; channels last.
        """
        found: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        paths = {id(layer): path for path, layer in self._layers[id(model)].items()}

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            value, path = args[0] if args else kwargs.get("input"), paths[id(layer)]
            if path not in found and isinstance(value, Tensor) and value.ndim > 1 and id(value) not in seen:
                seen[id(value)] = value
                found[path] = value.movedim(self._axes[path], -1)

        with pre_hooks(self._layers[id(model)].values(), hook):
            yield found

    @torch.no_grad()
    def weigh(self, runs: Iterable[tuple[Inputs, Inputs]], total: float) -> None:
        """Weights with which the sum of errors is ``total`` in the mean of these runs of both models."""
        errors: dict[str, list[float]] = {}
        odd: set[str] = set()
        for wanted, given in runs:
            for path in wanted.keys() & given.keys():
                if _comparable(wanted[path], given[path]):
                    errors.setdefault(path, []).append(float(_error(wanted[path], given[path])))
                else:
                    odd.add(path)
        means = {path: sum(found) / len(found) for path, found in errors.items() if path not in odd}
        counted = {path: mean for path, mean in means.items() if mean > _LEAST}
        self.weights = {path: total / len(counted) / mean for path, mean in sorted(counted.items())}

    def distance(self, wanted: Inputs, given: Inputs) -> Tensor:
        """The weighted sum of errors, of the layers that read alike values in this run."""
        alike = [path for path in self.weights if path in wanted and path in given]
        pairs = ((self.weights[path], wanted[path], given[path]) for path in alike)
        errors = [weight * _error(w, g) for weight, w, g in pairs if w.shape == g.shape and w.numel()]
        return sum(errors, torch.zeros(()))


def _error(wanted: Tensor, given: Tensor) -> Tensor:
    size = wanted.square().sum(-1)
    return ((given - wanted).square().sum(-1) / torch.maximum(size, size.mean()).clamp(min=_TINY)).mean()


def _comparable(wanted: Tensor, given: Tensor) -> bool:
    if wanted.shape != given.shape or not wanted.numel():
        return False
    varied = (wanted - wanted.flatten(0, -2).mean(0)).square().sum()
    difference = given - wanted
    lost = (difference - difference.flatten(0, -2).mean(0)).square().sum()
    return bool(lost < _ALIKE * varied)
