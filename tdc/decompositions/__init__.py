"""The registry of decompositions: every file of this folder, and the entry points of the group
``tdc.decompositions``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from inspect import isabstract

from ..errors import OptionError
from ._als import AlternatingDecomposition, refine
from ._joint import Stacked, fit_stacked, shared, stacked
from ._linalg import bias_shift, energy, low_rank
from ._output import absorbs, errors, fit, optimum, whitened
from .base import Decomposition, Factors, cancellation, rebuild

__all__ = [
    "AlternatingDecomposition",
    "Decomposition",
    "Factors",
    "Stacked",
    "absorbs",
    "bias_shift",
    "cancellation",
    "energy",
    "errors",
    "fit",
    "fit_stacked",
    "get",
    "low_rank",
    "names",
    "optimum",
    "rebuild",
    "refine",
    "shared",
    "stacked",
    "whitened",
]


@cache
def _registry() -> dict[str, Decomposition]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values()]
    found += [entry.load() for entry in entry_points(group="tdc.decompositions")]
    classes = {c for c in found if isinstance(c, type) and issubclass(c, Decomposition) and not isabstract(c)}
    registry: dict[str, Decomposition] = {}
    for c in sorted(classes, key=lambda c: c.name):
        if c.name in registry:
            raise OptionError(f"two decompositions are named {c.name!r}: {c} and {type(registry[c.name])}")
        registry[c.name] = c()
    return registry


def names() -> tuple[str, ...]:
    """Names of all decompositions, sorted. ``dense`` is not one: it is the absence of a decomposition."""
    return tuple(_registry())


def get(name: str) -> Decomposition:
    """The decomposition of that name. Raises OptionError with the known names and the nearest one."""
    try:
        return _registry()[name]
    except KeyError:
        import difflib

        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"unknown decomposition {name!r}{hint} Known: {', '.join(names())}") from None
