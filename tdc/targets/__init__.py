"""The registry of targets: every file of this folder, Python or TOML."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from functools import cache
from pathlib import Path

from ..errors import OptionError
from ._described import Described, Recorded
from ._description import ENDING, read
from .base import Target
from .cpu import with_table

__all__ = ["Target", "described", "get", "names"]

_RECORDED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*@[0-9a-f]{12}")
_TABLE = ".json"


@cache
def _registry() -> dict[str, Target]:
    modules = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name[0] != "_"
    ]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Target) and "name" in vars(value)
    }
    return {c.name: c() for c in sorted(classes, key=lambda c: c.name)}


@cache
def _shipped() -> dict[str, Described]:
    machines = [read(path) for path in sorted(Path(__file__).parent.glob(f"*{ENDING}"))]
    return {machine.id: Described(machine) for machine in machines}


def names() -> tuple[str, ...]:
    """Names of all targets that are Python classes, sorted."""
    return tuple(_registry())


def described() -> tuple[str, ...]:
    """Names of the descriptions that come with TDC, sorted."""
    return tuple(_shipped())


def get(name: str) -> Target:
    """The target of that name; ``auto`` is the processor. Or that of a description (``.toml``) or of a table of times
    (``.json``) at a path, or the one that a plan names (``id@digest``).

    Raises OptionError with the known names; TargetError for a file that cannot be read, or a table of another machine.
    """
    registry, shipped = _registry(), _shipped()
    if (plain := "cpu" if name == "auto" else name) in registry:
        return registry[plain].here()
    if name in shipped:
        return shipped[name]
    if _RECORDED.fullmatch(name) and not os.path.exists(name):
        same = [target for target in shipped.values() if target.name == name]
        return same[0] if same else Recorded(name)
    if name.endswith(ENDING):
        return Described(read(name))
    if name.endswith(_TABLE):
        return with_table(name)
    known = ", ".join(("auto", *registry, *shipped))
    raise OptionError(f"unknown target {name!r}. Known: {known}; or the path of a description ({ENDING})")
