"""What the doors share: checked options, batches, and the way from a unit to its result and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import decompositions, targets
from ._search import Goal, evaluated, searched
from .errors import BudgetError, CalibrationError, OptionError
from .ir import Cost, Plan, Remark
from .options import Options, named_allocation, takes_budget
from .passes.base import Pass, Unit
from .passes.pipeline import APPLYING, COMPRESSING, LOWERING, PROPOSING, Pipeline
from .passes.time_layouts import TimeLayouts
from .planning.budget import Budget
from .report import Report
from .statistics import Statistics

if TYPE_CHECKING:
    from .frontends.program import Program

__all__ = [
    "Names",
    "check_decided",
    "checked_options",
    "goal_of",
    "in_time",
    "is_searched",
    "is_timed",
    "new_unit",
    "peeked",
    "realized",
    "reported",
    "told_times",
]

Names = str | Iterable[str] | None


def checked_options(
    budget: object, metric: str, target: str, allow: Names, exclude: Names, allocation: str, seed: int, progress: bool
) -> Options:
    """Options, with everything that can be wrong in them refused before any long work."""
    allowed, excluded = Options.names(allow, "allow"), Options.names(exclude, "exclude")
    for name in allowed:
        if name != "all":
            decompositions.get(name)
    if budget is not None and Budget.parse(budget).timed and allocation == "uniform":
        raise BudgetError(f"the budget {Budget.parse(budget)} names time: it is spent by the allocation lagrangian")
    return Options(budget, metric, target, allowed, excluded, named_allocation(allocation), seed, progress)


def check_decided(options: Options, plan: object = None) -> None:
    """Raise OptionError unless one of a plan, a budget and an allocation that takes none decides what stays."""
    suggests = not takes_budget(options.allocation)
    if plan is not None and suggests:
        raise OptionError(f"the plan has its ranks already: leave out plan=, or allocation={options.allocation!r}")
    if not suggests and (plan is None) == (options.budget is None):
        raise OptionError(
            "give budget= (for example budget='params=0.5') or plan=, one of the two; or, in place of both, an "
            "allocation that needs no budget: allocation='evbmf' or 'energy'"
        )


def is_searched(options: Options) -> bool:
    """Whether the budget is met by measuring plans."""
    return options.budget is not None and bool(Budget.parse(options.budget).least)


def peeked(example: Any, batches: Any) -> tuple[Any, Any]:
    """The example inputs, by default the first batch, and the batches with none of them used up."""
    if example is not None or batches is None or hasattr(batches, "get_next"):
        return example, batches
    if isinstance(batches, (nn.Module, str, bytes)) or not isinstance(batches, Iterable):
        return None, batches
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        return batches, batches
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("the calibration data is empty: it gave no batch")
    if iterator is batches:
        batches = chain([first], iterator)
    return first, batches


def new_unit(
    program: Program,
    options: Options,
    calibration: Any,
    statistics: Statistics | str | Path | None,
    probe: Any,
    workload: Any = None,
) -> Unit:
    known = Statistics.load(statistics) if isinstance(statistics, (str, Path)) else statistics
    if known is not None and not isinstance(known, Statistics):
        raise OptionError(f"statistics= takes what tdc.calibrate returns, or a path; got {type(known).__name__}")
    mix = () if workload is None else _workload(program, options, workload)
    if is_timed(options) and not mix and isinstance(reason := program.stopwatch(()), str):
        if calibration is None:
            raise BudgetError(f"the budget {Budget.parse(options.budget)} names time: {reason}")
        first, calibration = peeked(None, calibration)
        if known is not None and first is not None:  # else the first batch that calibration sees
            mix = ((next(iter(program.batches([first]))), 1.0),)
    return Unit(program, targets.get(options.target), options, calibration, probe, known, workload=mix)


def _workload(program: Program, options: Options, given: Any) -> tuple[tuple[Any, float], ...]:
    """Batches as the program reads them, with how often each is run."""
    form = "workload= takes pairs of example inputs and how often they are run, such as [(prompt, 1), (token, 100)]"
    if not is_timed(options):
        raise OptionError("workload= says what is timed: it goes with a budget such as 'latency=0.7'")
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise OptionError(f"{form}; got {type(given).__name__}")
    made = []
    for pair in given:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or isinstance(pair[1], bool):
            raise OptionError(form)
        example, weight = pair
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise OptionError(f"{form}; got {weight!r} for how often")
        made.append((next(iter(program.batches([example]))), float(weight)))
    if not made:
        raise OptionError(f"{form}; it is empty")
    return tuple(made)


def is_timed(options: Options) -> bool:
    """Whether the budget names time."""
    return options.budget is not None and Budget.parse(options.budget).timed


def in_time(unit: Unit, times: Callable[[Any], tuple[float, float]]) -> Unit:
    """With the time of the result beside that of the model before, where the budget names time. ``times``: both in
    seconds, on a batch, or on the example (None).
    """
    return unit.remarking(Remark("", TimeLayouts.name, told_times(unit, times))) if is_timed(unit.options) else unit


def told_times(unit: Unit, times: Callable[[Any], tuple[float, float]]) -> str:
    each = [(weight, *times(batch)) for batch, weight in unit.workload or ((None, 1.0),)]
    old, new = (sum(entry[0] * entry[k] for entry in each) for k in (1, 2))
    what = f"the workload of {len(each)} examples" if len(each) > 1 else "the example"
    return f"{what} takes {new / old:.3g} of the dense time: {1e3 * old:.3g} -> {1e3 * new:.3g} ms"


def realized(
    unit: Unit,
    plan: Plan | str | Path | None,
    exchange: Callable[[Pass], Pass] = lambda step: step,
    goal: Goal | None = None,
) -> Unit:
    """The unit after planning (where no plan is given), fitting and rewriting; ``exchange`` may put another pass in the
    place of one.
    """
    check_decided(unit.options, plan)
    if plan is None and is_searched(unit.options):
        unit = searched(Pipeline([exchange(step) for step in PROPOSING]).run(unit), goal, exchange)
        return Pipeline([exchange(step) for step in LOWERING]).run(unit)
    if plan is None:
        return Pipeline([exchange(step) for step in COMPRESSING]).run(unit)
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    target = unit.target
    if unit.options.target == "auto" and plan.target != target.name:
        target = targets.get(plan.target)
    return Pipeline([exchange(step) for step in APPLYING]).run(unit.having(plan=plan, target=target))


def goal_of(
    options: Options, evaluate: object, drop: object, dense: Any, finished: Callable[[Any], Any]
) -> tuple[Options, Goal | None]:
    """The goal of ``evaluate=`` and ``metric_drop=``, if they are given, with options whose budget is to be searched.

    ``finished`` makes of what :meth:`Program.finish` gives what ``evaluate`` takes, as it takes the dense model.
    """
    if evaluate is None and drop is None:
        return options, None
    if not takes_budget(options.allocation):
        raise OptionError(f"metric_drop= limits the loss: it cannot go with the allocation {options.allocation}")
    budget = Budget.parse("params=min" if options.budget is None else options.budget)
    if not budget.least or budget.loss is not None:
        raise OptionError(
            f"the budget {budget} and metric_drop= are two limits: give one of them (with metric_drop=, a budget such "
            f"as 'macs=min' says of what as little as possible is to stay)"
        )
    goal = evaluated(evaluate, drop, dense, lambda unit: finished(Pipeline(LOWERING).run(unit).result))
    return replace(options, budget=str(budget)), goal


def reported(unit: Unit, before: Cost, after: Cost) -> Report:
    assert unit.plan is not None
    errors = {order: (found.metric, found.weight, found.cancellation) for order, found in unit.errors.items()}
    return Report.of(unit.program.door, replace(unit.plan, remarks=unit.remarks), errors, (before, after))
