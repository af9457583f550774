"""Which modules hold a weight that acts linearly, and how their attributes read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir import OpKind, Window

__all__ = [
    "NORMS",
    "canonical_weight",
    "held",
    "kind_of",
    "padded",
    "quicker",
    "stored_weight",
    "weight_sizes",
    "windows_of",
]

_CONVS: dict[type[nn.Module], OpKind] = {
    nn.Conv1d: OpKind.CONV1D,
    nn.Conv2d: OpKind.CONV2D,
    nn.Conv3d: OpKind.CONV3D,
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def kind_of(module: nn.Module) -> OpKind | None:
    """``linear`` for ``nn.Linear`` and the transposed ``Conv1D`` of transformers, ``conv1d`` to ``conv3d`` for torch's
    convolutions (and subclasses with their forward); None for every other module, and objects with one of their own.
    """
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "parametrizations") or "forward" in vars(module):
        return None
    if not isinstance(module._parameters.get("weight"), Tensor):
        return None
    if isinstance(module, nn.Linear):
        kind = getattr(type(module), "stands_for", type(module))  # by a kernel it computes the same
        return OpKind.LINEAR if kind.forward is nn.Linear.forward else None
    for base, kind in _CONVS.items():
        if isinstance(module, base):
            own = type(module)
            own_methods = (own.forward, getattr(own, "_conv_forward", None))
            return kind if own_methods == (base.forward, getattr(base, "_conv_forward", None)) else None
    return OpKind.LINEAR if _is_conv1d(module) else None


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def canonical_weight(module: nn.Module, stored: Tensor) -> Tensor:
    """The weight in canonical axes, (o, i) or (g o, i, window axes): a view of the stored one."""
    return stored.T if _is_conv1d(module) else stored


def stored_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of :func:`canonical_weight`."""
    return canonical_weight(module, weight)


def weight_sizes(module: nn.Module, weight: Tensor) -> tuple[tuple[str, int], ...]:
    """Sizes of the canonical axes of ``weight``, which the module holds."""
    kind, shape = kind_of(module), canonical_weight(module, weight).shape
    if kind is None or not kind.is_conv:
        return (("o", shape[0]), ("i", shape[1]))
    groups = int(module.groups)  # type: ignore[arg-type]
    return (("g", groups), ("o", shape[0] // groups), ("i", shape[1]), *zip(kind.windows, shape[2:], strict=True))


def windows_of(module: nn.Module) -> tuple[Window, ...]:
    """The windows of a convolution module; padding that is not of zeros is done before, see :func:`padded`."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ()
    kind = kind_of(module)
    assert kind is not None
    # Pairs (before, after) in reverse order of the axes, as torch works them out for every way to state the padding.
    pads = list(module._reversed_padding_repeated_twice)[::-1] if module.padding_mode == "zeros" else []
    made = []
    for k, axis in enumerate(kind.windows):
        size = module.kernel_size[k]
        after, before = pads[2 * k : 2 * k + 2] if pads else (0, 0)
        made.append(Window(axis, size, module.stride[k], module.dilation[k] if size > 1 else 1, before, after))
    return tuple(made)


def padded(module: nn.Module, activation: Tensor) -> Tensor:
    """What the weight of a convolution module slides over, up to zeros: its input, padded where the mode is another."""
    mode = getattr(module, "padding_mode", "zeros")
    if mode == "zeros":
        return activation
    return functional.pad(activation, module._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]


def held(layer: nn.Module, name: str) -> Any:
    """The parameter or buffer, the quickest way."""
    for own in (layer._parameters, layer._buffers):
        if name in own:
            return own[name]
    return getattr(layer, name)


def quicker(layer: nn.Module, run: Any, names: Iterable[str]) -> Any:
    """A way to run with less to look at, where ``run`` offers one for the factors ``names`` of the layer; else None."""
    own = (layer._parameters, layer._buffers)
    places = {name: (held, f"weight_{name}") for name in names for held in own if f"weight_{name}" in held}
    offered = getattr(run, "quick", None)
    return None if offered is None else offered(places, layer._parameters)
