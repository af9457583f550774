"""choose-plan: one candidate per site under the budget."""

from __future__ import annotations

from dataclasses import dataclass

from tdc.errors import BudgetError, ModelError, VerificationError
from tdc.ir import Candidate, Plan, Remark
from tdc.planning.allocate import Option, allocate, allocate_uniform, prefer_compressed
from tdc.planning.budget import Budget

from .base import Pass, Unit
from .propose_layouts import metric_name

__all__ = ["ChoosePlan"]


@dataclass(frozen=True)
class ChoosePlan(Pass):
    """``loss = sensitivity * error`` is minimised over all sites within one budget (allocation ``lagrangian``); how far
    the choice can be above the least possible loss stands in the plan.

    Sites that came out dense are then compressed where that is as good, within the band of the prediction. With
    ``uniform`` every site takes its most accurate candidate within the same fraction of its own dense cost.
    """

    name = "choose-plan"

    def run(self, unit: Unit) -> Unit:
        if not unit.sites:
            reasons = "; ".join(str(remark) for remark in unit.remarks[:5])
            raise ModelError(f"the model has no site that can be decomposed. {reasons}")
        budget = Budget.parse(unit.options.budget)
        if budget.least:
            raise BudgetError(f"the budget {budget} is met by measuring plans: it is one of tdc.plan and tdc.compress")
        rows = [unit.candidates[site.order] for site in unit.sites]
        if unit.options.allocation == "uniform":
            taken, bound = allocate_uniform([[Option(c.cost, c.error) for c in row] for row in rows], budget), None
        else:
            options = [[Option(c.cost, c.sensitivity * c.error) for c in row] for row in rows]
            found = allocate(options, budget)
            taken, bound = prefer_compressed(options, found.chosen), float(f"{found.bound:.6g}")
        picked = [row[k] for row, k in zip(rows, taken, strict=True)]
        remarks = [_kept_dense(c) for c, row in zip(picked, rows, strict=True) if c.is_dense and len(row) > 1]
        unit = unit.remarking(*remarks)
        plan = Plan(
            choices=tuple(picked),
            metric=metric_name(unit),
            statistics=unit.statistics.digest if unit.statistics is not None else "",
            target=unit.target.name,
            budget=str(budget),
            allocation=unit.options.allocation,
            seed=unit.options.seed,
            bound=bound,
            remarks=unit.remarks,
        )
        return unit.having(plan=plan)

    def ensures(self, before: Unit, after: Unit) -> None:
        assert after.plan is not None
        spent, dense = after.plan.cost, after.plan.dense_cost
        for key, limit in Budget.parse(after.options.budget).allowance(dense).items():
            if getattr(spent, key) > limit * (1 + 1e-9):
                raise VerificationError(f"the plan spends {getattr(spent, key)} {key}; the budget allows {limit}")


def _kept_dense(candidate: Candidate) -> Remark:
    reason = (
        f"stays dense: {candidate.sensitivity:.3g} per unit of error makes every smaller layout cost more than it saves"
    )
    return Remark(candidate.site.name, "choose-plan", reason)
