"""rewrite-graph: the one pass that touches the model, all or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Pass, Unit

__all__ = ["RewriteGraph"]


@dataclass(frozen=True)
class RewriteGraph(Pass):
    """Hands every block and its factors to the program, which cuts them all in at once and drops the dense weights."""

    name = "rewrite-graph"
    touches_model: ClassVar[bool] = True

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        for choice in unit.plan.choices:
            order = choice.site.order
            if order in unit.blocks:
                block = unit.blocks[order]
                factors = {name: unit.factors[order][name] for name, _ in block.factors}
                unit.program.replace(choice.site, block, factors, choice.decomposition)
        return unit.having(result=unit.program.finish())
