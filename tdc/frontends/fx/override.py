"""What nodes of a graph do in place of their own work: another weight, or telling their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir import Site
from ..program import Tap
from .captured import Override
from .match import Use

__all__ = ["marked", "with_weight"]


def marked(site: Site, tap: Tap) -> Override:
    """Hands the gradient of what a node gives to ``tap``; of normalisations that give three values, of the first."""

    def mark(result: Any) -> Any:
        first = result[0] if isinstance(result, (tuple, list)) else result
        marked = first if first.requires_grad else first + first.new_zeros((), requires_grad=True)
        marked.register_hook(lambda gradient: tap(site, gradient))
        return (marked, *result[1:]) if isinstance(result, (tuple, list)) else marked

    return mark


def with_weight(use: Use, weight: Tensor, bias: Tensor | None) -> Override:
    """The operator with another weight, in canonical axes, and bias."""
    form = use.form
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
    spots = [use.node.args.index(a) if a is not None else None for a in (use.activation, use.bias, use.rest)]

    def run(args: tuple[Any, ...]) -> Tensor:
        values: list[Any] = [None if spot is None else args[spot] for spot in spots]
        activation, own, rest = values
        given = weight.to(activation.device, use.dtype or weight.dtype)
        added = own if bias is None else bias.to(given)
        if not form.kind.is_conv:
            result = torch.nn.functional.linear(activation, given, added)
            return result if rest is None else rest + result
        pads = [size for w in reversed(form.windows) for size in (w.before, w.after)]
        strides, dilations = [w.stride for w in form.windows], [w.dilation for w in form.windows]
        activation = torch.nn.functional.pad(activation, pads) if any(pads) else activation
        return convolve[len(strides) - 1](activation, given, added, strides, 0, dilations, form.groups)

    return run
