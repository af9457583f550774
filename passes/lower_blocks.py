"""lower-blocks: the primitives that the target runs in place of every site."""

from __future__ import annotations

from dataclasses import dataclass

from tdc.errors import VerificationError
from tdc.ir import Block, Remark

from .base import Pass, Unit
from .fit_factors import left_dense
from .propose_layouts import lowered

__all__ = ["LowerBlocks"]


@dataclass(frozen=True)
class LowerBlocks(Pass):
    """Asks the target for every site's block; a site that the target declines stays dense, with its reason."""

    name = "lower-blocks"

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        blocks: dict[int, Block] = {}
        failed: dict[int, Remark] = {}
        for choice in unit.plan.choices:
            if choice.site.order not in unit.factors:
                continue
            _, block = lowered(unit.target, choice)
            if block:
                blocks[choice.site.order] = block
            else:
                failed[choice.site.order] = Remark(choice.site.name, self.name, block.reason)
        return left_dense(unit, failed).having(blocks=blocks)

    def ensures(self, before: Unit, after: Unit) -> None:
        if set(after.blocks) != set(after.factors):
            raise VerificationError("a site has factors but no block")
