"""find-sites: all weights that act linearly."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from tdc.errors import OptionError, VerificationError
from tdc.ir import Remark

from .base import Pass, Unit

__all__ = ["FindSites"]


@dataclass(frozen=True)
class FindSites(Pass):
    """Asks the program for its sites and leaves out those that the user excludes.

    Raises OptionError if an ``exclude`` pattern fits no site: it is a typing error more often than not.
    """

    name = "find-sites"

    def run(self, unit: Unit) -> Unit:
        sites, remarks = unit.program.sites()
        kept, left_out = [], []
        fitting: set[str] = set()
        for site in sites:
            patterns = [p for p in unit.options.exclude if any(_fits(name, p) for name in site.names)]
            fitting.update(patterns)
            if patterns:
                left_out.append(Remark(site.name, "find-sites", f"excluded by {patterns[0]!r}"))
            else:
                kept.append(site)
        if unknown := [p for p in unit.options.exclude if p not in fitting]:
            raise OptionError(f"exclude={unknown} fits no site; sites are named like {[s.name for s in sites[:3]]}")
        return unit.having(sites=tuple(kept)).remarking(*remarks, *left_out)

    def ensures(self, before: Unit, after: Unit) -> None:
        orders = [site.order for site in after.sites]
        if orders != sorted(set(orders)):
            raise VerificationError("sites are not in topological order, or one comes twice")


def _fits(name: str, pattern: str) -> bool:
    """Whole name, name without its last part (the module of a weight), or a shell pattern of the name."""
    return pattern in (name, name.rpartition(".")[0]) or fnmatchcase(name, pattern)
