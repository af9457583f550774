"""What targets say of time, for planning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from tdc.ir import Candidate, Layout
from tdc.ir.machine import Machine, Table, Work
from tdc.planning.path import StepCost, StepSizes, multiply_adds
from tdc.planning.seconds import Clock
from tdc.planning.works import Call, call_of, conv_work, products, rows_of
from tdc.targets import Target

__all__ = ["StepSeconds", "call_for", "clock_of", "order_cost"]


def clock_of(target: Target) -> Clock | None:
    """The clock of a target, None where it says nothing of time."""
    return None if target.machine is None else _clock(target.machine, target.table)


@lru_cache(maxsize=32)
def _clock(machine: Machine, table: Table | None) -> Clock:
    return Clock(machine, table)


def call_for(candidate: Candidate, *, told: bool = True) -> Call:
    """One use of the site, with as many rows as its dense cost was counted for.

    What is decided must be the same in all doors, and not all of them know lengths and memory format of a site: then,
    not ``told``, all positions are taken for those of one example in the usual format.
    """
    site = candidate.site if told else replace(candidate.site, lengths=(), layout="")
    return call_of(site, rows_of(site, candidate.dense_cost))


@dataclass(frozen=True)
class StepSeconds:
    """The cost of a step of a contraction: its seconds in one call."""

    clock: Clock
    call: Call

    def __call__(self, step: StepSizes) -> float:
        return sum(self.clock.work(work).seconds for work in self.works(step))

    def works(self, step: StepSizes) -> tuple[Work, ...]:
        call = self.call
        if step.conv:
            size = (call.examples, call.plane * step.positions, float(step.positions))
            own = conv_work(
                step.taps, "/2" if step.strided else "", size, step.batch, step.inputs, step.outputs, call.dtype
            )
            return (own,)
        moved = step.batch > 1 or step.others > 1
        return products(call.examples, step.batch, step.others, step.inputs, step.outputs, call.dtype, moved)


def order_cost(target: Target, candidate: Candidate, layout: Layout) -> StepCost:
    """What the search of an order makes least: seconds where the target says so, else multiply-adds. Sites of a group
    keep to the latter: what they share must be the same for all of them.
    """
    if not target.orders_by_time or candidate.joint is not None or len(layout.rebuild.factors) < 3:
        return multiply_adds
    clock = clock_of(target)
    return multiply_adds if clock is None else _step_seconds(clock, call_for(candidate, told=False))


@lru_cache(maxsize=1024)
def _step_seconds(clock: Clock, call: Call) -> StepSeconds:
    return StepSeconds(clock, call)
