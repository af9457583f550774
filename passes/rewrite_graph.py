"""rewrite-graph: the one pass that touches the model, all or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tdc import decompositions
from tdc.frontends.program import Replacement

from .base import Pass, Unit
from .propose_joint import members_of
from .propose_layouts import lowered

__all__ = ["RewriteGraph"]


@dataclass(frozen=True)
class RewriteGraph(Pass):
    """Hands every block and its factors to the program, which cuts them all in at once and drops the dense weights."""

    name = "rewrite-graph"
    touches_model: ClassVar[bool] = True

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        unit.program.forget()
        groups = members_of(unit.plan.choices)
        for choice in unit.plan.choices:
            order, joint = choice.site.order, choice.joint
            if order in unit.blocks:
                new = Replacement(
                    block=unit.blocks[order],
                    factors=unit.factors[order],
                    decomposition=choice.decomposition,
                    output_order=unit.output_orders.get(order),
                    shift=unit.shifts.get(order),
                    lead=groups[joint.group][0].site.order if joint else None,
                    shared=decompositions.shared(lowered(unit.target, choice)[0]) if joint else frozenset(),
                )
                unit.program.replace(choice.site, new)
        return unit.having(result=unit.program.finish())
