"""Putting modules in the place of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["place"]

_OWN = frozenset(nn.Module().__dict__)


def place(model: nn.Module, swaps: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules at their paths, and in the lists, tuples and dicts of attributes that hold the ones they replace. The
    fused evaluation path of torch's own encoder layers is switched off where a part of them is replaced: it reads the
    dense weights, which would be formed at every call. Their encoders make no nested tensors then, which serve that
    path.
    """
    new: dict[int, nn.Module] = {}
    old: list[nn.Module] = []
    for path, module in swaps:
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        old.append(getattr(parent, child))  # kept: its id is that of no other one
        new[id(old[-1])] = module
        setattr(parent, child, module)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
    new_modules = set(new.values())
    for holder in list(model.modules()):
        if isinstance(holder, nn.TransformerEncoder) and not new_modules.isdisjoint(holder.modules()):
            holder.use_nested_tensor = False
        for name, value in list(vars(holder).items()):
            if name not in _OWN and (changed := _exchanged(value, new)) is not value:
                vars(holder)[name] = changed


def _exchanged(value: Any, new: Mapping[int, nn.Module]) -> Any:
    """The value with the modules in it exchanged: lists and dicts as they are, with other entries."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) is tuple:
        entries = tuple(_exchanged(entry, new) for entry in value)
        return value if all(a is b for a, b in zip(entries, value, strict=True)) else entries
    if isinstance(value, list):
        value[:] = [_exchanged(entry, new) for entry in value]
    elif isinstance(value, dict):
        value.update({key: _exchanged(entry, new) for key, entry in value.items()})
    return value
