"""Factors that were fitted before: for this process by the identity of the weights, in a folder by their content."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._settings import log
from .errors import DestinationError
from .files import atomic_write
from .frontends.fx.program import FxProgram
from .ir import Candidate, Site
from .passes._hidden import hidden_members, kept_among
from .passes.base import Unit
from .passes.fit_factors import FitFactors
from .passes.propose_joint import members_of

__all__ = ["CachedFit", "Stamp", "forget_fits", "stamp_of"]

Stamp = tuple[int, int]
_VERSION = 2
"""Of what is kept in folders: another one reads no older files."""

_Key = tuple[Any, ...]
_fitted: dict[_Key, Mapping[str, Tensor]] = {}
_origins: dict[_Key, set[int]] = {}


def stamp_of(tensor: Tensor) -> Stamp:
    """Version and address: one of them differs after whatever PyTorch counts as a change of a tensor."""
    return (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def forget_fits(tensors: Iterable[Tensor]) -> None:
    """Drop the factors that were made from any of these: a change that PyTorch does not count leaves their key as it
    was.
    """
    changed = {id(tensor) for tensor in tensors}
    for key in [key for key, origins in _origins.items() if changed & origins]:
        _forget(key)


def _forget(key: _Key) -> None:
    _fitted.pop(key, None)
    _origins.pop(key, None)


@dataclass(frozen=True)
class CachedFit(FitFactors):
    """Fits no weight twice in one process: graphs that share a weight, and compilations that are repeated, share its
    factors. Entries go with their weights. With a ``folder``, fits to statistics are kept there too, and found by the
    content of the weight, the layout, the metric and the statistics; a file that cannot be read is fitted anew.
    """

    folder: Path | None = None

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        choices = [choice for choice in unit.plan.choices if not choice.is_dense]
        groups = (*members_of(choices).values(), *hidden_members(choices).values())
        beside = {c.site.order: members for members in groups for c in members}
        together = {c.site.order: beside.get(c.site.order, (c,)) for c in choices}
        own = {c.site.order: _key(unit, c) for c in choices}
        keys = {order: (own[order], *(own[c.site.order] for c in group)) for order, group in together.items()}
        files = {} if self.folder is None else _files(self.folder, unit, together)
        found = {order: _fitted.get(keys[order]) or _read(files.get(order)) for order in keys}
        known = {
            order: factors
            for order, factors in found.items()
            if factors is not None and all(found[c.site.order] is not None for c in together[order])
        }
        rest = tuple(c for c in unit.plan.choices if c.site.order not in known)
        done = super().run(unit.having(plan=replace(unit.plan, choices=rest)))
        assert done.plan is not None
        for order, factors in {**known, **done.factors}.items():
            _keep(unit, order, keys[order], factors)
        for order, factors in done.factors.items():
            if order in files and order not in done.anchored:
                _write(files[order], factors)
        decided = {c.site.order: c for c in (*unit.plan.choices, *done.plan.choices)}
        choices = [decided[c.site.order] for c in unit.plan.choices]
        plan = replace(done.plan, choices=tuple(choices))
        fitted: dict[int, Mapping[str, Tensor]] = {**known, **done.factors}
        return done.having(plan=plan, factors=fitted, kept=kept_among(fitted, plan))


def _origins_of(unit: Unit, site: Site) -> tuple[Tensor, ...]:
    assert isinstance(unit.program, FxProgram)
    return unit.program.origins(site)


def _digest(unit: Unit) -> str:
    return unit.statistics.digest if unit.statistics is not None else ""


def _key(unit: Unit, choice: Candidate) -> _Key:
    tensors = tuple((id(t), *stamp_of(t)) for t in _origins_of(unit, choice.site))
    metric = unit.plan.metric if unit.plan is not None else ""
    decided = (choice.decomposition, choice.variant, choice.ranks, choice.site.attributes, *choice.kept.items())
    return (*tensors, *decided, metric, _digest(unit))


def _keep(unit: Unit, order: int, key: _Key, factors: Mapping[str, Tensor]) -> None:
    site = next(site for site in unit.sites if site.order == order)
    origins = _origins_of(unit, site)
    _fitted[key] = dict(factors)
    _origins[key] = {id(tensor) for tensor in origins}
    for tensor in origins:
        weakref.finalize(tensor, _forget, key).atexit = False


def _files(folder: Path, unit: Unit, together: Mapping[int, Sequence[Candidate]]) -> dict[int, Path]:
    """The file of each site's factors. They follow from the weight as it is with a normalisation folded in."""
    sites = {c.site.order: c.site for group in together.values() for c in group}
    weights = {order: _hashed(unit.program.weight(site)) for order, site in sites.items()}
    metric, made = unit.plan.metric if unit.plan is not None else "", {}
    for order, group in together.items():
        mine = next(c for c in group if c.site.order == order)
        parts = [str(_VERSION), metric, _digest(unit), unit.target.name]
        for c in (mine, *group):
            parts += [weights[c.site.order], c.decomposition, c.variant, str(c.ranks), str(c.site.attributes)]
            parts += [str(c.sensitivity), str(c.joint and c.joint.outputs), str(c.kept), str(c.site.dtype)]
        made[order] = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.safetensors"
    return made


def _hashed(weight: Tensor) -> str:
    flat = weight.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode() + flat.numpy().tobytes()).hexdigest()


def _read(file: Path | None) -> dict[str, Tensor] | None:
    if file is None or not file.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("tdc: %s cannot be read (%s): the weight is fitted anew", file, error)
        return None


def _write(file: Path, factors: Mapping[str, Tensor]) -> None:
    """Where it cannot be written, the weight is fitted anew the next time."""
    from safetensors.torch import save

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save({name: factor.contiguous() for name, factor in factors.items()}))
    except (OSError, DestinationError) as error:
        log.warning("tdc: fitted factors are not kept: %s", error)
