"""predict-time: how long the replaced sites take by the target's table or description, where the budget says nothing
of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdc.ir import Candidate, Remark
from tdc.planning.budget import Budget
from tdc.planning.seconds import Estimate

from ._clock import call_for, clock_of
from ._seconds import dense_seconds, kernel_seconds, site_seconds
from .base import Pass, Unit
from .propose_joint import members_of

__all__ = ["PredictTime"]

_SLOWER = 1.02
"""A site that is predicted to take more than this part of its dense time is told of."""


@dataclass(frozen=True)
class PredictTime(Pass):
    """Adds to the plan a remark for each site that is predicted to be slower than dense, and one for all sites."""

    name = "predict-time"

    def run(self, unit: Unit) -> Unit:
        plan, clock = unit.plan, clock_of(unit.target)
        budget = unit.options.budget
        if plan is None or clock is None or (budget is not None and Budget.parse(budget).timed):
            return unit
        groups = {number: members[0].site.order for number, members in members_of(plan.choices).items()}
        before, after, remarks = Estimate(0.0), Estimate(0.0), list[Remark]()
        for choice in plan.choices:
            dense = dense_seconds(clock, choice)
            first = choice.joint is None or groups[choice.joint.group] == choice.site.order
            new = dense if choice.is_dense else site_seconds(clock, unit.target, choice, shares=not first)
            before, after = before + dense, after + new
            if not choice.is_dense and new.seconds > _SLOWER * dense.seconds:
                kernel = kernel_seconds(clock, unit.target, choice)
                remarks.append(Remark(choice.site.name, self.name, _slower(choice, dense, new, kernel)))
        if before.seconds:
            remarks.append(Remark("", self.name, _whole(unit, before, after)))
        if unit.target.remark:
            remarks.append(Remark("", self.name, unit.target.remark))
        return unit.having(plan=replace(plan, remarks=(*plan.remarks, *remarks))).remarking(*remarks)


def _slower(choice: Candidate, dense: Estimate, new: Estimate, kernel: Estimate | None) -> str:
    call = call_for(choice)
    rows = f"{call.rows:.4g} {'positions' if choice.site.kind.is_conv else 'rows'}"
    rows = "1 row" if call.rows == 1 else rows
    text = f"predicted {new.seconds / dense.seconds:.2f} times the dense time at {rows} ({(dense + new).label})"
    if kernel is not None:
        text += f"; {kernel.seconds / dense.seconds:.2f} with tdc.kernels.accelerate ({(dense + kernel).label})"
    return text


def _whole(unit: Unit, before: Estimate, after: Estimate) -> str:
    table, machine = unit.target.table, unit.target.machine
    assert machine is not None
    source = f"by the description {machine.id}"
    if table is not None:
        source = f"by the times of this machine, {table.date}, table {table.key}{', noisy' if table.noisy else ''}"
    times = f"{1e3 * after.seconds:.3g} ms of {1e3 * before.seconds:.3g} ms"
    share = f"{after.seconds / before.seconds:.3g} of the dense time"
    return f"predicted time of the candidate sites: {share}, {times} ({(before + after).label}, {source})"
