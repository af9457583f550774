"""fold-permutations: an output that comes in another order is left so where its only reader can take it so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdc import decompositions
from tdc.ir import Candidate, Decline, Plan, Site
from tdc.planning.cost import block_cost
from tdc.statistics import SiteStatistics

from .base import Pass, Unit
from .propose_layouts import Work, lowered, site_statistics

__all__ = ["FoldPermutations"]


@dataclass(frozen=True)
class FoldPermutations(Pass):
    """Saves the gather of a site whose output reaches one other replaced site, through elementwise functions only.

    With ``y = stack[place]`` at the output of the first (see :class:`tdc.ir.Rebuild`) and ``f`` elementwise,
    ``W f(stack[place]) = W[:, order] f(stack)`` with ``order = argsort(place)``: the columns of the second one's
    factors are put in the order of the stack once, when the model is rewritten, and so is the bias of the first. The
    hidden units in between come in another order; the function of the model is the same.
    """

    name = "fold-permutations"

    def run(self, unit: Unit) -> Unit:
        plan: Plan | None = unit.plan
        assert plan is not None
        replaced = {choice.site.order: choice for choice in plan.choices if not choice.is_dense}
        here = {site.order: site for site in unit.sites}
        known = site_statistics(unit)
        folded: dict[int, Candidate] = {}
        for order, choice in replaced.items():
            reader = here[order].pointwise_consumer
            if reader in replaced and _once(here[order]) and _once(here[reader]):
                variant = _gathering_variant(choice)
                if variant is not None:
                    folded[order] = _folded(unit, choice, variant, known.get(order))
        choices = tuple(folded.get(c.site.order, replace(c, folded=False)) for c in plan.choices)
        return unit.having(plan=replace(plan, choices=choices))


def _once(site: Site) -> bool:
    return not site.tied


def _gathering_variant(choice: Candidate) -> str | None:
    """The variant that writes the same approximation with a gather of the output at its end, if there is one."""
    if choice.joint is not None or choice.hidden is not None:
        return None
    decomposition = decompositions.get(choice.decomposition)
    axes = choice.site.axes
    for variant in (choice.variant, *decomposition.same_fit(axes, choice.variant)):
        shape = decomposition.rebuild(axes, variant)
        if any(pivot.leading for pivot in shape.pivots.values()):
            return variant
    return None


def _folded(unit: Unit, choice: Candidate, variant: str, entry: SiteStatistics | None) -> Candidate:
    new = replace(choice, variant=variant, folded=True)
    layout, block = lowered(unit.target, new)
    if isinstance(block, Decline):
        return choice
    work = Work.of(unit, choice.site, entry)
    cost = block_cost(choice.site, layout, block, work.rows, work.ratios)
    return replace(new, cost=replace(cost, seconds=choice.cost.seconds))
