"""choose-plan: one candidate per site under the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdc.errors import BudgetError, ModelError, VerificationError
from tdc.ir import Candidate, Plan, Remark, Rival
from tdc.options import takes_budget
from tdc.planning.allocate import Option, allocate, allocate_suggested, allocate_uniform, prefer_compressed
from tdc.planning.budget import Budget

from .base import Pass, Unit
from .propose_layouts import metric_name

__all__ = ["ChoosePlan"]

_SUGGESTED = (
    "no budget: each weight has the ranks that {} suggests, in the format of least n ln(error) + params ln(n), "
    "n the numbers in the weight"
)


@dataclass(frozen=True)
class ChoosePlan(Pass):
    """``loss = sensitivity * error`` is minimised over all sites within one budget (allocation ``lagrangian``); how far
    the choice can be above the least possible loss stands in the plan.

    Sites that came out dense are then compressed where that is as good, within the band of the prediction. With
    ``uniform`` every site takes its most accurate candidate within the same fraction of its own dense cost. With an
    allocation that takes no budget, whose candidates have the ranks that it suggests, every site takes the one of
    the shortest description (:func:`tdc.planning.allocate.allocate_suggested`).
    """

    name = "choose-plan"

    def run(self, unit: Unit) -> Unit:
        if not unit.sites:
            reasons = "; ".join(str(remark) for remark in unit.remarks[:5])
            raise ModelError(f"the model has no site that can be decomposed. {reasons}")
        rows = [unit.candidates[site.order] for site in unit.sites]
        taken, price, bound = _taken(unit, rows)
        picked = [replace(row[k], rivals=_rivals(row, row[k], price)) for row, k in zip(rows, taken, strict=True)]
        if unit.options.budget is None:
            unit = unit.remarking(Remark("", self.name, _SUGGESTED.format(unit.options.allocation)))
        remarks = [_kept_dense(c) for c, row in zip(picked, rows, strict=True) if c.is_dense and len(row) > 1]
        unit = unit.remarking(*remarks)
        plan = Plan(
            choices=tuple(picked),
            metric=metric_name(unit),
            statistics=unit.statistics.digest if unit.statistics is not None else "",
            target=unit.target.name,
            budget="" if unit.options.budget is None else str(Budget.parse(unit.options.budget)),
            allocation=unit.options.allocation,
            seed=unit.options.seed,
            bound=bound,
            price=tuple(price.items()),
            remarks=unit.remarks,
        )
        return unit.having(plan=plan)

    def ensures(self, before: Unit, after: Unit) -> None:
        assert after.plan is not None
        if after.options.budget is None:
            return
        spent, dense = after.plan.cost, after.plan.dense_cost
        for key, limit in Budget.parse(after.options.budget).allowance(dense).items():
            if getattr(spent, key) > limit * (1 + 1e-9):
                raise VerificationError(f"the plan spends {getattr(spent, key)} {key}; the budget allows {limit}")


def _taken(unit: Unit, rows: Sequence[Sequence[Candidate]]) -> tuple[Sequence[int], Mapping[str, float], float | None]:
    """For each row the index of the chosen candidate; the prices, and the bound of the loss, where they are known."""
    errors = [[Option(c.cost, c.error) for c in row] for row in rows]
    if not takes_budget(unit.options.allocation):
        return allocate_suggested(errors), {}, None
    budget = Budget.parse(unit.options.budget)
    if budget.least:
        raise BudgetError(f"the budget {budget} is met by measuring plans: it is one of tdc.plan and tdc.compress")
    if unit.options.allocation == "uniform":
        return allocate_uniform(errors, budget), {}, None
    options = [[Option(c.cost, c.sensitivity * c.error) for c in row] for row in rows]
    found = allocate(options, budget)
    price = {key: float(f"{value:.6g}") for key, value in found.price.items()}
    return prefer_compressed(options, found.chosen), price, float(f"{found.bound:.6g}")


def _rivals(row: Sequence[Candidate], chosen: Candidate, price: Mapping[str, float]) -> tuple[Rival, ...]:
    """Of each format the candidate of least loss at these prices, of the chosen one's that one."""

    def priced(candidate: Candidate) -> float:
        cost = sum(value * getattr(candidate.cost, key) for key, value in price.items())
        return candidate.sensitivity * candidate.error + cost

    best: dict[tuple[str, str, str], Candidate] = {}
    for candidate in row:
        key = (candidate.decomposition, candidate.variant, candidate.execution)
        if (
            candidate is chosen
            or key not in best
            or (best[key] is not chosen and priced(candidate) < priced(best[key]))
        ):
            best[key] = candidate
    rivals = [
        Rival(
            decomposition=c.decomposition,
            variant=c.variant,
            ranks=c.ranks,
            error=c.error,
            loss=float(f"{c.sensitivity * c.error:.6g}"),
            params=c.cost.params,
            priced=float(f"{priced(c):.6g}"),
        )
        for c in best.values()
    ]
    return tuple(sorted(rivals, key=lambda rival: rival.priced))


def _kept_dense(candidate: Candidate) -> Remark:
    reason = (
        f"stays dense: {candidate.sensitivity:.3g} per unit of error makes every smaller layout cost more than it saves"
    )
    return Remark(candidate.site.name, "choose-plan", reason)
