"""Fronts: plans for several budgets, from the proposals of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import BudgetError
from .ir import Plan, Remark
from .ir.text import format_table
from .options import Options
from .passes.base import Unit
from .passes.choose_plan import ChoosePlan
from .passes.pipeline import CHOOSING, Pipeline

__all__ = ["Front", "front_of"]


@dataclass(frozen=True)
class Front:
    """Plans from the most to the least that stays. Each is the plan that :func:`tdc.plan` makes for its budget alone.

    ``remarks``: which budgets are left out, and why. ``print(front)`` is a table.
    """

    plans: tuple[Plan, ...]
    remarks: tuple[Remark, ...] = ()

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, place: int) -> Plan:
        return self.plans[place]

    def __str__(self) -> str:
        rows = [
            (
                plan.budget,
                *(_share(plan, quantity) for quantity in ("params", "bytes", "macs")),
                f"{plan.loss:.4g}",
                f"{sum(not choice.is_dense for choice in plan.choices)} of {len(plan.choices)}",
            )
            for plan in self.plans
        ]
        header = ("budget", "params", "bytes", "macs", "predicted loss", "replaced")
        return "\n".join([format_table(header, rows), *map(str, self.remarks)])


def _share(plan: Plan, quantity: str) -> str:
    dense = getattr(plan.dense_cost, quantity)
    return f"{getattr(plan.cost, quantity) / dense if dense else 1.0:.4f}"


def front_of(unit: Unit, options: Sequence[Options]) -> Front:
    """A plan for the budget of each of the options, from the candidates of the unit.

    Raises BudgetError if none of them can be reached.
    """
    plans, refused = [], []
    for each in options:
        try:
            made = Pipeline(CHOOSING).run(unit.having(options=each)).plan
        except BudgetError as error:
            refused.append(Remark("", ChoosePlan.name, str(error)))
            continue
        assert made is not None
        plans.append(made)
    if not plans:
        raise BudgetError("; ".join(remark.reason for remark in refused))
    plans.sort(key=lambda made: (-made.cost.params, made.loss))
    return Front(tuple(plans), tuple(refused))
