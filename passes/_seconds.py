"""Seconds of sites, as they are and replaced, by what the target says of time."""

from __future__ import annotations

from collections.abc import Sequence

from tdc import decompositions
from tdc.ir import Block, Candidate
from tdc.ir.machine import Work
from tdc.planning.seconds import Clock, Estimate
from tdc.planning.works import dense_block
from tdc.targets import Target

from ._clock import call_for, clock_of
from .propose_layouts import lowered

__all__ = ["dense_seconds", "kernel_seconds", "members_seconds", "site_seconds"]


def dense_seconds(clock: Clock, candidate: Candidate, *, told: bool = True) -> Estimate:
    """Seconds of the dense operator in all uses; ``told``: see :func:`call_for`."""
    site = candidate.site
    return clock.block(dense_block(site), call_for(candidate, told=told)).times(site.uses)


def site_seconds(
    clock: Clock, target: Target, candidate: Candidate, *, shares: bool = False, told: bool = True
) -> Estimate:
    """Seconds of a candidate in all uses; ``shares``: another site of its group computes what they have in common."""
    if candidate.is_dense:
        return dense_seconds(clock, candidate, told=told)
    layout, block = lowered(target, candidate)
    assert isinstance(block, Block)
    common = block.values_of(decompositions.shared(layout)) if shares else ()
    return clock.block(block, call_for(candidate, told=told), common).times(candidate.site.uses)


def kernel_seconds(clock: Clock, target: Target, candidate: Candidate) -> Estimate | None:
    """Seconds of a candidate by TDC's own kernel of two products, None where that has not been measured near there."""
    layout, block = lowered(target, candidate)
    call = call_for(candidate)
    if not isinstance(block, Block) or [op.kind for op in block.ops] != ["matmul", "matmul"] or layout.rebuild.pivots:
        return None
    shapes = dict(block.factors)
    (rank, inputs), (outputs, _) = (shapes[op.inputs[1]] for op in block.ops)
    found = clock.work(Work("two products", (call.rows, float(inputs), float(rank), float(outputs)), call.dtype))
    return None if found.label == "modelled" else found.times(candidate.site.uses)


def members_seconds(target: Target, members: Sequence[Candidate]) -> float:
    """Seconds of the sites of a group, or of one site alone, for decisions: the first one computes what they share."""
    clock = clock_of(target)
    assert clock is not None
    return sum(site_seconds(clock, target, c, shares=k > 0, told=False).seconds for k, c in enumerate(members))
