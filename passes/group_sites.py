"""group-sites: tied weights are one site; weights of rank one by shape are none."""

from __future__ import annotations

from dataclasses import dataclass

from tdc.errors import VerificationError
from tdc.ir import Remark, Site

from .base import Pass, Unit

__all__ = ["GroupSites"]


@dataclass(frozen=True)
class GroupSites(Pass):
    """Leaves out what no decomposition can gain on, and checks that tied uses came as one site."""

    name = "group-sites"

    def run(self, unit: Unit) -> Unit:
        thin = [site for site in unit.sites if _has_rank_one(site)]
        remarks = [Remark(s.name, self.name, f"{s.label} has rank 1 by its shape") for s in thin]
        return unit.having(sites=tuple(s for s in unit.sites if s not in thin)).remarking(*remarks)

    def ensures(self, before: Unit, after: Unit) -> None:
        names = [name for site in after.sites for name in site.names]
        if len(names) != len(set(names)):
            raise VerificationError("one weight is in two sites: tied uses must be one site")


def _has_rank_one(site: Site) -> bool:
    """One output or one input, and no window that could be split."""
    _, outputs, width = site.matrix
    wide = sum(window.size > 1 for window in site.windows)
    return min(outputs, width) < 2 and wide < 2
