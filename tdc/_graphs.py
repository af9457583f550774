"""The doors whose models are graphs: ONNX files and exported programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ._common import Names, check_decided, checked_options, goal_of, in_time, new_unit, peeked, realized, reported
from .archive import RECORD, stored_report
from .errors import DestinationError, ModelError
from .ir import Plan
from .report import Report
from .statistics import Statistics

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["compress_export", "compress_onnx"]


def compress_onnx(
    source: str | Path,
    destination: str | Path,
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
    evaluate: Callable[[Path], float] | None = None,
    metric_drop: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Compress an ONNX file into another one of standard operators; arguments as for :func:`compress`.

    The result is checked (onnx.checker with shape inference, an onnxruntime session) before it gets its name; a failure
    leaves nothing behind. Names, metadata, opset and all that is not replaced stay. The report is stored in the
    metadata (``tdc.report``). ``evaluate`` gets the path of a file: of the source, and of candidates.

    Raises:
        ModelError: a source that is not a valid ONNX model.
        DestinationError: a destination that cannot be written, or is the source.
        VerificationError: a result that the checker or onnxruntime refuses.
        BudgetError, CalibrationError, PlanError, OptionError: as for :func:`compress`.
    """
    from .files import checked_destination
    from .frontends.onnx import OnnxProgram, file_size, load_model, save_model

    into, out = Path(source), checked_destination(destination)
    if out.exists() and into.exists() and out.samefile(into):
        raise DestinationError(f"{out} is the input file: choose another name for the output")
    options = checked_options(budget, metric, target, allow, exclude, allocation, seed, progress)
    program = OnnxProgram(load_model(into), into)
    example, calibration = peeked(None, calibration)
    batch = next(program.batches([example]), None) if example is not None else None
    before = program.cost(batch)
    with TemporaryDirectory(dir=out.parent if evaluate is not None else None) as folder:

        def written(result: Any) -> Path:
            save_model(result, candidate := Path(folder) / out.name, source=into, metadata={})
            return candidate

        options, goal = goal_of(options, evaluate, metric_drop, into, written)
        unit = realized(new_unit(program, options, calibration, statistics, probe, workload), plan, goal=goal)
    unit = in_time(unit, lambda batch: program.times(unit.result, batch))
    made = replace(reported(unit, before, OnnxProgram(unit.result, None).cost(batch)), files=(file_size(into), 0))
    save_model(unit.result, out, source=into, metadata={"tdc.report": made.to_json()})
    return stored_report(out)


def compress_export(
    program: ExportedProgram,
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
    evaluate: Callable[[ExportedProgram], float] | None = None,
    metric_drop: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ExportedProgram:
    """Compress an ``ExportedProgram`` into another one of standard operators; arguments as for :func:`tdc.compress`.

    Inputs, outputs, dynamic sizes and the names of all that is not replaced stay. The result can be saved by
    ``torch.export.save``, compiled by AOTInductor and exported by ``torch.onnx.export``. Batches are what the program
    takes: a tensor, a tuple, a dict of keywords.

    Returns:
        The new program; :func:`tdc.report` tells what was done, as long as it is not saved and loaded.

    Raises:
        ModelError: not an exported program, or one without sites.
        VerificationError: a result that cannot be exported again, or gives something else.
        BudgetError, CalibrationError, PlanError, OptionError: as for :func:`tdc.compress`.
    """
    from .frontends.fx.export import export_again, open_exported

    if not isinstance(program, torch.export.ExportedProgram):
        raise ModelError(f"compress_export takes a torch.export.ExportedProgram; got {type(program).__name__}")
    options = checked_options(budget, metric, target, allow, exclude, allocation, seed, progress)
    if evaluate is None:
        check_decided(options, plan)
    calibration = peeked(None, calibration)[1]
    opened = open_exported(program)
    before = opened.cost()
    options, goal = goal_of(
        options, evaluate, metric_drop, program, lambda result: export_again(program, opened, result)
    )
    unit = realized(new_unit(opened, options, calibration, statistics, probe, workload), plan, goal=goal)
    unit = in_time(unit, lambda batch: opened.times(unit.result, batch))
    made = reported(unit, before, opened.cost_of(unit.result))
    small = export_again(program, opened, unit.result)
    assert unit.plan is not None
    small.__dict__[RECORD] = (made, unit.plan)
    return small
