"""The weights of a module by storage, and where each is first used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...ir import Decline
from .capture import Capture, Use, is_hooked
from .layers import kind_of, weight_sizes, windows_of

__all__ = [
    "Weight",
    "called_place",
    "captured_place",
    "check_readable",
    "is_unwatched",
    "plain",
    "storage_key",
    "stored_weights",
]


@dataclass
class Weight:
    """One stored tensor and everything that reads it."""

    tensor: Tensor
    names: list[str]
    modules: dict[str, nn.Module]
    other: list[str]


def plain(tensor: Tensor) -> Tensor:
    """Without gradient, also where the tensor was made in inference mode (``detach`` of such a one does not do)."""
    with torch.no_grad():
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory; tensors without storage count by themselves."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def stored_weights(model: nn.Module) -> list[Weight]:
    """All matrices (and higher) of the model by storage, with the linear and convolution modules and the others that
    hold them.
    """
    found: dict[tuple[Any, ...], Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module._parameters.items():
            if tensor is None or tensor.ndim < 2:
                continue
            full = f"{path}.{name}" if path else name
            weight = found.setdefault(storage_key(tensor), Weight(tensor, [], {}, []))
            weight.names.append(full)
            if name == "weight" and path and kind_of(module) is not None:
                weight.modules[path] = module
            else:
                itself = ", the model itself (put it into an nn.Sequential)" if not path and kind_of(module) else ""
                weight.other.append(f"{full} of {type(module).__name__}{itself}")
    return list(found.values())


def _held_elsewhere(weight: Weight) -> Decline | None:
    if not weight.modules:
        return Decline(f"held by {', '.join(weight.other)}: only linear and convolution modules are handled")
    if weight.other:
        others = ", ".join(weight.other)
        return Decline(f"tied to {others}, neither a linear nor a convolution module; all uses stay dense together")
    forms = {(kind_of(m), weight_sizes(m, weight.tensor), windows_of(m)) for m in weight.modules.values()}
    if len(forms) > 1:
        return Decline("its uses disagree about which axis is the output, or about groups, stride or padding")
    return None


def is_unwatched(weight: Weight) -> bool:
    """No hook looks at what goes into or comes out of its modules."""
    return not any(is_hooked(m) for m in weight.modules.values())


Place = tuple[int, int, Use | None]


def captured_place(weight: Weight, seen: Capture) -> Place | Decline:
    """Position of the first use, number of uses, and the use if there is one only; from the exported graph."""
    held = _held_elsewhere(weight)
    if held is not None:
        return held
    uses = [use for name in weight.names for use in seen.uses.get(name, ())]
    if not uses:
        return Decline("the example inputs do not reach it")
    for use in uses:
        if not use.linear:
            return Decline(f"also read by {use.operator} in a way that no layer does")
        if use.module not in weight.modules:
            return Decline(
                f"read by {use.operator} in {use.module or 'the model'} past its own module, which cannot be swapped"
            )
    uses.sort(key=lambda use: use.position)
    return uses[0].position, len(uses), uses[0] if len(uses) == 1 else None


def called_place(weight: Weight, calls: Mapping[nn.Module, tuple[int, int]]) -> Place | Decline:
    """The same from the calls of the modules."""
    held = _held_elsewhere(weight)
    if held is not None:
        return held
    made = [calls[module] for module in set(weight.modules.values()) if module in calls]
    if not made:
        return Decline("its module is not called on the example inputs")
    return min(first for first, _ in made), sum(count for _, count in made), None


def check_readable(model: nn.Module) -> None:
    """Raises ModelError for modules whose weights cannot be read or exchanged."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be rewritten: give the nn.Module that it was made from")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} is not initialized yet (a lazy module): run the model on one batch first")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device, where weights have no values: load the weights first")
