"""lower-blocks: the primitives that the target runs in place of every site, and the factors they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdc.errors import VerificationError
from tdc.ir import Block, Candidate, Decline, Layout, Remark

from .base import Pass, Unit
from .fit_factors import left_dense
from .propose_layouts import lowered

__all__ = ["LowerBlocks"]

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LowerBlocks(Pass):
    """Asks the target for every site's block, and puts the factors behind a folded gather in their new order.

    A site that the target declines stays dense, with its reason.
    """

    name = "lower-blocks"

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        failed: dict[int, Remark] = {}
        for choice in unit.plan.choices:
            if choice.site.order in unit.factors:
                _, block = lowered(unit.target, choice)
                if isinstance(block, Decline):
                    failed[choice.site.order] = Remark(choice.site.name, self.name, block.reason)
        unit = left_dense(unit, failed)
        assert unit.plan is not None
        choices = {choice.site.order: choice for choice in unit.plan.choices if choice.site.order in unit.factors}
        factors, orders = _reordered(unit, choices)
        blocks: dict[int, Block] = {}
        for order, choice in choices.items():
            block = lowered(unit.target, choice)[1]
            assert not isinstance(block, Decline)
            blocks[order] = block
            factors[order] = {name: factors[order][name] for name, _ in block.factors}
        return unit.having(blocks=blocks, factors=factors, output_orders=orders)

    def ensures(self, before: Unit, after: Unit) -> None:
        if set(after.blocks) != set(after.factors):
            raise VerificationError("a site has factors but no block")
        for order, block in after.blocks.items():
            shapes = {name: tuple(factor.shape) for name, factor in after.factors[order].items()}
            if shapes != dict(block.factors):
                raise VerificationError(
                    f"the factors of site {order} have shapes {shapes}; its block reads {block.factors}"
                )


def _reordered(unit: Unit, choices: Mapping[int, Candidate]) -> tuple[dict[int, Factors], dict[int, Tensor]]:
    """Factors with every folded gather taken in by its reader, and the order in which each folded output comes, or
    which hidden units.
    """
    factors, orders = dict(unit.factors), {}
    for order, choice in choices.items():
        if choice.hidden is not None and choice.hidden.axis == "o":
            orders[order] = unit.kept[choice.hidden.group]
        if not choice.folded:
            continue
        layout, _ = lowered(unit.target, choice)
        index = next(pivot.index for pivot in layout.rebuild.pivots.values() if pivot.leading)
        place = unit.factors[order][index].long()
        reader = choices[next(s for s in unit.sites if s.order == order).pointwise_consumer or 0]
        factors[reader.site.order] = _reads(lowered(unit.target, reader)[0], factors[reader.site.order], place)
        orders[order] = torch.argsort(place)
    return factors, orders


def _reads(layout: Layout, factors: Factors, place: Tensor) -> dict[str, Tensor]:
    """Factors of a site whose input x (along axis i) comes as ``stack`` with ``x = stack[place]``."""
    shape = layout.rebuild
    order, changed = torch.argsort(place), dict(factors)
    for name, term in shape.factors.items():
        pivot = shape.pivots.get(name)
        if pivot is not None and pivot.split == "i":
            index = factors[pivot.index]
            changed[pivot.index] = place[index.long()].to(index.dtype)
        elif ("i",) in term.groups:
            changed[name] = factors[name].index_select(term.groups.index(("i",)), order)
    return changed
