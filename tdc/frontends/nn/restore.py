"""Putting saved factors into the dense architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...ir import Block, Site
from ..graph import memory_format
from .attention import open_above
from .factored import Factored, factored
from .layers import kind_of
from .placing import place
from .sharing import Sharing
from .weights import plain

__all__ = ["Saved", "restore"]


@dataclass(frozen=True)
class Saved:
    """A replaced site: its block, the group with which it shares factors (0: none), and whether it gives fewer hidden
    units than the dense one.
    """

    site: Site
    block: Block
    decomposition: str
    group: int = 0
    shared: frozenset[str] = frozenset()
    fewer_units: bool = False


def restore(
    model: nn.Module,
    sites: Sequence[Saved],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> None:
    """Swap the named modules of ``model`` for factored ones and give the model the saved tensors, in place.

    Normalisations that were folded into sites hand their input on.

    ``sites`` are found by name. Raises PlanError, with nothing changed, if a named
    module is missing or of another size, or the tensors do not fit; or if something of the model stays on ``meta``.
    """
    open_above(model, (name.removesuffix(".weight") for saved in sites for name in saved.site.names))
    groups, formats = _shared(model, aliases), _formats(model)
    swaps: list[tuple[str, nn.Module]] = []
    groups_of: dict[int, Sharing] = {}
    for saved in sites:
        sharing = groups_of.setdefault(saved.group, Sharing(saved.shared)) if saved.group else None
        swaps += _factored(model, saved, sharing, tensors, aliases)
        norm = saved.site.norm
        swaps += [(path, nn.Identity()) for path in _aliases_of(model, norm)] if norm else []
    place(model, swaps)
    try:
        answer = model.load_state_dict(_formatted(model, tensors, formats), strict=False, assign=True)
    except RuntimeError as error:
        raise PlanError(f"the saved tensors do not fit the model: {error}") from error
    loaded = set(tensors)
    left_out = _left_out(model)
    missing = [
        name
        for name in answer.missing_keys
        if not any(name in group and group & loaded for group in groups) and not left_out(name)
    ]
    if missing or answer.unexpected_keys:
        raise PlanError(
            f"the saved tensors do not fit the model: missing {missing[:5]}, not known {answer.unexpected_keys[:5]}"
        )
    for group in groups:
        source = next((name for name in sorted(group) if name in loaded), None)
        if source is not None:
            _tie(model, source, sorted(group - loaded))
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise PlanError(
            f"{', '.join(empty[:3])} of the model is on the meta device, and the file holds no values for it: build "
            f"the architecture on a real device"
        )


def _factored(
    model: nn.Module,
    saved: Saved,
    sharing: Sharing | None,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> list[tuple[str, nn.Module]]:
    site, block, first = saved.site, saved.block, sharing is None or sharing.count == 0
    made: dict[int, Factored] = {}
    swaps: list[tuple[str, nn.Module]] = []
    for name in site.names:
        path = name.removesuffix(".weight")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PlanError(f"the model has no module {path}, which the file holds factors for") from None
        if kind_of(module) is not site.kind:
            name, kind = type(module).__name__, site.kind.value
            raise PlanError(f"{path} is a {name}, not the {kind} module that the file was made from")
        if id(module) not in made:
            factors: dict[str, Tensor] = {}
            for factor, shape in block.factors:
                if factor in saved.shared and not first:
                    continue
                stored = tensors.get(key := f"{path}.weight_{factor}", tensors.get(aliases.get(key, "")))
                if stored is None or tuple(stored.shape) != shape:
                    raise PlanError(f"the file holds no factor {key} of shape {list(shape)}")
                factors[factor] = torch.empty_like(stored)
            bias = module._parameters.get("bias")
            stored = tensors.get(key := f"{path}.bias", tensors.get(aliases.get(key, "")))
            if stored is not None and (bias is None or saved.fewer_units):
                bias = nn.Parameter(torch.empty_like(stored))
            made[id(module)] = factored(module, block, factors, saved.decomposition, bias, sharing)
        swaps.append((path, made[id(module)]))
    return swaps


def _left_out(model: nn.Module) -> Callable[[str], bool]:
    """Which parameters the classes of transformers do not write to files: those that are computed."""
    told = (getattr(model, f"_keys_to_ignore_on_{when}", None) or () for when in ("save", "load_missing"))
    patterns = [re.compile(pattern) for patterns in told for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _formats(model: nn.Module) -> dict[str, torch.memory_format]:
    """Path of a module -> the memory format of its weight, where that is channels-last."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        wanted = None if weight is None else memory_format(plain(weight))
        if wanted is not None:
            found[path] = wanted
    return found


def _formatted(
    model: nn.Module, tensors: Mapping[str, Tensor], formats: Mapping[str, torch.memory_format]
) -> dict[str, Tensor]:
    """The tensors, files have none, in the memory formats of the architecture's weights."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        wanted = formats.get(name.rpartition(".")[0])
        if wanted is not None and tensor.ndim == (4 if wanted == torch.channels_last else 5):
            found[name] = tensor.contiguous(memory_format=wanted)
    return found


def _aliases_of(model: nn.Module, path: str) -> list[str]:
    """All paths of the module at one of them. Raises PlanError if there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise PlanError(f"the model has no module {path}, which was folded into the layer before it") from None
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def _shared(model: nn.Module, aliases: Mapping[str, str]) -> list[set[str]]:
    """Sets of names that stand for one parameter: in the model as it is, and in the file."""
    by_id: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), set()).add(name)
    groups = [group for group in by_id.values() if len(group) > 1]
    for alias, name in aliases.items():
        groups.append({alias, name})
    return groups


def _tie(model: nn.Module, source: str, names: Sequence[str]) -> None:
    path, _, leaf = source.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = tensor
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor
