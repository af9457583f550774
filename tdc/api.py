"""The doors of TDC for modules, exported programs and ONNX files, and what reads their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from . import targets
from ._common import (
    Names,
    checked_options,
    goal_of,
    is_searched,
    is_timed,
    new_unit,
    peeked,
    realized,
    reported,
    told_times,
)
from ._graphs import compress_export, compress_onnx
from ._search import searched
from .archive import RECORD, load, note_in_config, noted, save, stored_report
from .errors import BudgetError, ModelError, OptionError
from .front import Front, front_of
from .frontends.nn import Factored, NnProgram, as_call, times
from .frontends.nn.attention import close_attention
from .frontends.nn.running import copy_without
from .heal import Heal, heal, healed
from .ir import Cost, Plan
from .kernels import accelerate
from .kernels.layers import STAGE
from .options import Options, takes_budget
from .passes.base import Unit
from .passes.calibrate import Calibrate
from .passes.find_sites import FindSites
from .passes.group_sites import GroupSites
from .passes.pipeline import PLANNING, PROPOSING, Pipeline
from .passes.time_layouts import TimeLayouts
from .report import Report
from .statistics import Statistics

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from .frontends.program import Program

__all__ = [
    "calibrate",
    "compress",
    "compress_export",
    "compress_onnx",
    "densify",
    "heal",
    "load",
    "pareto",
    "plan",
    "report",
    "save",
]

BUDGETS = tuple(f"params={tenths / 10}" for tenths in range(9, 0, -1))

M = TypeVar("M", bound=nn.Module)


def calibrate(
    model: nn.Module | str | Path,
    batches: Any,
    *,
    probe: Any = None,
    metric: str = "auto",
    exclude: Names = (),
    seed: int = 0,
    progress: bool = True,
) -> Statistics:
    """Gather the statistics of a model's sites: reusable for any budget, savable, the same for every door.

    Runs the dense model over ``batches`` and accumulates, for every distinct input of sites, ``S = E[x x^T]`` (i, i)
    and ``E[x]`` (i), of convolutions those of the patches under the window, and where the model can run backwards
    ``G = E[g g^T]`` (o, o) of the gradients of each site's output; then measures each site's sensitivity by forward
    runs with that site alone approximated.

    Args:
        model: a module, or the path of an ONNX file.
        batches: an iterable of example inputs (tensors, tuples, dicts of keywords), a DataLoader; for ONNX anything
            with ``get_next()`` or an iterable of ``{input name: array}``. Use data like the data of use, not the test
            data. Where an input ``attention_mask`` (examples, positions) is 0, there is padding: it counts nowhere.
        probe: batches for the sensitivities; default the first eight examples of the first batch. Time: up to eight
            forward runs per site and probe batch, one for most of more than 64 sites.
        metric: ``auto`` or ``fisher``: with output gradients, of random projections (see
            :class:`tdc.statistics.Probe`); ``input``: without, in half of the time.
        exclude: names or shell patterns of sites to leave out.
        seed: of the random projections.
        progress: show a bar on work over two seconds.

    Returns:
        Statistics; ``save(path)`` and ``Statistics.load(path)`` keep them.

    Raises:
        CalibrationError: no batch, or batches that the model cannot run on.
        ModelError: no module, no readable file, or no site in it.
    """
    example, batches = peeked(None, batches)
    program = _open(model, example)
    options = Options(metric=metric, exclude=Options.names(exclude, "exclude"), seed=seed, progress=progress)
    unit = Unit(program, targets.get("auto"), options, calibration=batches, probe=probe)
    unit = Pipeline((FindSites(), GroupSites(), Calibrate())).run(unit)
    if unit.statistics is None:
        raise ModelError("the model has no site: " + "; ".join(map(str, unit.remarks[:5])))
    return unit.statistics


def plan(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    budget: object = None,
    calibration: Any = None,
    statistics: Statistics | str | Path | None = None,
    metric: str = "auto",
    target: str = "auto",
    allow: Names = None,
    exclude: Names = (),
    allocation: str = "lagrangian",
    probe: Any = None,
    workload: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Decide what :func:`compress` would do, and cut nothing. ``print(plan)`` is a table, ``plan.to_json()`` a file.

    Arguments as for :func:`compress`; ``model`` may also be the path of an ONNX file (``example_inputs``
    is not needed then).

    Raises:
        BudgetError, CalibrationError, ModelError, OptionError: as for :func:`compress`.
    """
    example, calibration = peeked(example_inputs, calibration)
    options = checked_options(budget, metric, target, allow, exclude, allocation, seed, progress)
    if options.budget is None and takes_budget(options.allocation):
        raise BudgetError("give budget= (for example budget='params=0.5'), or allocation='evbmf' or 'energy'")
    unit = new_unit(_open(model, example), options, calibration, statistics, probe, workload)
    if is_searched(options):
        made = searched(Pipeline(PROPOSING).run(unit), None).plan
    else:
        made = Pipeline(PLANNING).run(unit).plan
    assert made is not None
    return made


def pareto(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    budgets: Iterable[object] = BUDGETS,
    calibration: Any = None,
    statistics: Statistics | str | Path | None = None,
    metric: str = "auto",
    target: str = "auto",
    allow: Names = None,
    exclude: Names = (),
    allocation: str = "lagrangian",
    probe: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """The plans for several budgets, with the loss that each is predicted to cause; layouts are proposed once for all.

    Arguments as for :func:`compress`, which cuts one by ``plan=front[k]``; ``budgets``: by default nine, that keep nine
    to one tenths of the parameters. One that cannot be reached is left out, with a remark.

    Raises:
        BudgetError: a budget that cannot be read, no budget, or none that can be reached.
        CalibrationError, ModelError, OptionError: as for :func:`compress`.
    """
    wanted = [budgets] if isinstance(budgets, (str, Mapping)) else list(budgets)
    if not wanted:
        raise BudgetError("budgets is empty: name at least one, for example 'params=0.5'")
    example, calibration = peeked(example_inputs, calibration)
    each = [checked_options(b, metric, target, allow, exclude, allocation, seed, progress) for b in wanted]
    if len({is_timed(options) for options in each}) > 1:
        raise BudgetError("budgets that name time and others do not go together: their candidates are not the same")
    unit = Pipeline(PROPOSING).run(new_unit(_open(model, example), each[0], calibration, statistics, probe))
    return front_of(unit, each)


def compress(
    model: M,
    example_inputs: Any = None,
    *,
    budget: object = None,
    calibration: Any = None,
    statistics: Statistics | str | Path | None = None,
    metric: str = "auto",
    target: str = "auto",
    plan: Plan | str | Path | None = None,
    allow: Names = None,
    exclude: Names = (),
    allocation: str = "lagrangian",
    probe: Any = None,
    workload: Any = None,
    heal: bool | Heal = False,
    evaluate: Callable[[M], float] | None = None,
    metric_drop: float | None = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> M:
    """A smaller model of the same class: weights of linear and convolution layers as products of trainable factors.

    Args:
        model: a trained module. It is not changed, unless ``inplace``.
        example_inputs: one batch, a tuple or a dict of keywords, to trace the model; default the first batch.
        budget: what may stay, as fractions of the dense cost of the candidate sites: ``"params=0.5"``, or several,
            ``"params=0.5,macs=0.6"``, or a mapping; quantities params, bytes, macs. Or ``"loss=0.01"``: as few
            parameters (``macs=min``: multiply-adds) as move the outputs by that, in nats of logits or their relative
            square, on the probe, else the calibration batches. ``"latency=0.7"`` (of dense), ``"latency_ms=12"``: what
            a run on the example may take here, or of all ``workload``: pairs of inputs and how often they are run.
        calibration: data as for :func:`calibrate`; or ``statistics``: what it returned, or its file; both anchor fits.
        metric: norm of the error: ``weight`` (Frobenius, no data), ``input`` (mean squared error of the layer's output
            on the data), ``fisher`` (weighted by the gradients of the model's loss in it), ``auto``: the best possible.
        target, plan: the machine, see ``tdc target list``; a Plan, or the path of one, to apply instead of a budget.
        allow: names of the decompositions to choose from, or ``all``; see ``tdc list decompositions``.
        exclude, probe: sites or modules (names, shell patterns) that stay dense; batches, see :func:`calibrate`.
        allocation: ``lagrangian`` (one budget over all) or ``uniform`` (each site keeps the same fraction); or, without
            a budget, ``evbmf`` (a weight's singular values above its noise) or ``energy=0.95`` (of its squared norm).
        heal: train the factors on the first 256 MB of the calibration data, no labels: True, or a :class:`Heal`.
        evaluate, metric_drop: a function of a model, higher is better, and how much of that may be lost, as a budget.
        seed, progress, inplace: recorded in the plan; show a bar on long work; replace modules in ``model`` itself.

    Returns:
        The new model; :func:`report` tells what was done. Its factors are parameters ``weight_<factor>``.

    Raises:
        BudgetError: a budget that cannot be read or reached (the message gives the nearest reachable one).
        CalibrationError, ModelError, OptionError, PlanError: data, a model (no module, no site in it), names or values,
            a plan that cannot be read or do not fit.
    """
    _check_module(model, heal, calibration, inplace, evaluate)
    example, calibration = peeked(example_inputs, calibration)
    options = checked_options(budget, metric, target, allow, exclude, allocation, seed, progress)
    options, goal = goal_of(options, evaluate, metric_drop, model, lambda result: result)
    program = _open(model, example, inplace=inplace)
    before = program.cost()
    unit = realized(new_unit(program, options, calibration, statistics, probe, workload), plan, goal=goal)
    return _finished(unit, model, before, example, heal)


def _finished(unit: Unit, model: nn.Module, before: Cost, example: Any, heal: bool | Heal) -> Any:
    """The new module, with its report and plan in it, healed where that is wanted."""
    small = unit.result
    assert unit.plan is not None
    small.__dict__[RECORD] = (reported(unit, before, NnProgram(small, example).cost()), unit.plan)
    if heal:
        how = heal if isinstance(heal, Heal) else Heal(seed=unit.options.seed)
        healed(small, model, unit.anchors, how, progress=unit.options.progress)
    if is_timed(unit.options) and small is not model:
        call = as_call(model, example)
        noted(small, STAGE, _on_kernels(small, [batch for batch, _ in unit.workload] or [call]))
        noted(small, TimeLayouts.name, told_times(unit, lambda batch: times(model, small, batch or call)))
    note_in_config(small, small.__dict__[RECORD])
    return small


def _on_kernels(small: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> str:
    """Let the layers run on kernels where these are faster; what came of it."""
    examples = [args or kwargs for args, kwargs in calls if not (args and kwargs)]
    layers = accelerate(small, example=examples or None, dense=False)
    used = sum(layer.on_kernels for layer in small.modules() if isinstance(layer, Factored))
    return f"{used} of {len(layers)} replaced layers run on kernels, which are not saved with the model"


def _check_module(model: object, heal: object, calibration: object, inplace: bool, evaluate: object) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"compress takes a torch.nn.Module; got {type(model).__name__} (for ONNX files: compress_onnx)"
        )
    if heal and (calibration is None or inplace):
        needed = "the dense model, which inplace=True changes" if inplace else "calibration data: give calibration="
        raise OptionError(f"heal= needs {needed}")
    if inplace and evaluate is not None:
        raise OptionError("evaluate= compares models with the dense one, which inplace=True changes")


def report(small: nn.Module | ExportedProgram | str | Path) -> Report:
    """What TDC did to a module (also one that ``torch.compile(model, backend="tdc")`` gave), to an exported program, or
    to the ``.tdc`` or ``.onnx`` file at a path.

    Raises:
        ModelError: the module or file does not come from TDC, or cannot be read.
    """
    if isinstance(small, nn.Module):
        from ._doors import compiled_report

        return compiled_report(small) or _record(small)[0]
    if not isinstance(small, (str, Path)):
        return _record(small)[0]
    return stored_report(Path(small))


def densify(small: M) -> M:
    """A copy with plain layers again, of the replaced classes, that hold the approximated dense weights.

    ``W = rebuild(factors)`` for every factored layer; the outputs are those of ``small`` up to rounding.

    Raises:
        ModelError: the module has no factored layer.
    """
    if not any(isinstance(module, Factored) for module in small.modules()):
        raise ModelError("the model has no factored layer: nothing to densify")
    dense = copy_without(small)
    made: dict[int, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter | None] = {}
    for path, module in list(dense.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored):
            parent, _, child = path.rpartition(".")
            plain = made.setdefault(id(module), module.dense())
            tied = tuple(id(factor) for factor in module.factors.values())
            plain._parameters["weight"] = weights.setdefault(tied, plain._parameters["weight"])
            setattr(dense.get_submodule(parent), child, plain)
    for module in dense.modules():
        close_attention(module)
    dense.__dict__.pop(RECORD, None)
    note_in_config(dense, None)
    return dense


def _record(small: nn.Module | ExportedProgram) -> tuple[Report, Plan]:
    record = getattr(small, "__dict__", {}).get(RECORD)
    if record is None:
        raise ModelError("this module was not made by tdc.compress or tdc.load: there is no report")
    return record


def _open(model: nn.Module | str | Path, example: Any, *, inplace: bool = False) -> Program:
    if isinstance(model, (str, Path)):
        from .frontends.onnx import OnnxProgram, load_model

        return OnnxProgram(load_model(Path(model)), Path(model))
    if example is None:
        raise OptionError("give example_inputs= (a tuple or a dict of keywords), or calibration data")
    return NnProgram(model, example, inplace=inplace)
