"""The registry of targets: every file of this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..errors import OptionError
from .base import Target

__all__ = ["Target", "get", "names"]


@cache
def _registry() -> dict[str, Target]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Target) and value is not Target
    }
    return {c.name: c() for c in sorted(classes, key=lambda c: c.name)}


def names() -> tuple[str, ...]:
    """Names of all targets, sorted."""
    return tuple(_registry())


def get(name: str) -> Target:
    """The target of that name; ``auto`` is the processor. Raises OptionError with the known names."""
    try:
        return _registry()["cpu" if name == "auto" else name]
    except KeyError:
        raise OptionError(f"unknown target {name!r}. Known: auto, {', '.join(names())}") from None
