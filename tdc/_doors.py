"""Doors to models that ``torch.compile(model, backend="tdc")`` gave, and to exported programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .api import _compressed as _realized
from .api import _options, _peek, _report, _unit
from .archive import RECORD
from .errors import ModelError, OptionError
from .ir import Cost, Plan
from .report import Report
from .statistics import Statistics

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ._parts import Part

__all__ = ["compiled_report", "compress_export", "refresh", "wait"]

Names = str | Iterable[str] | None


def wait(compiled: nn.Module, *, timeout: float | None = None) -> None:
    """Wait until a model compiled with ``calibrate_calls`` has been planned, fitted and exchanged (or has failed to be,
    which :func:`report` tells). What has to be compiled for that is compiled here; without it, by the next call.

    Args:
        compiled: what ``torch.compile(model, backend="tdc")`` gave, or the module itself.
        timeout: seconds, None for as long as it takes.

    Raises:
        ModelError: it was not compiled by TDC or not called yet, lacks calls to gather, or the time is over.
    """
    end = None if timeout is None else time.monotonic() + timeout
    for part in _parts_of(compiled):
        if part.lacking > 0:
            raise ModelError(
                f"the model gathers calibration data: call it {part.lacking} more time(s) before you wait for it"
            )
        left = None if end is None else max(0.0, end - time.monotonic())
        if not part.done.wait(left):
            raise ModelError(f"the model was not planned and fitted within {timeout:g} seconds")
        for instance in list(part.instances):
            instance.arrive_now()


def refresh(compiled: nn.Module) -> None:
    """Fit the factors of a compiled model again, from the weights as they are now.

    Changes that PyTorch counts (in-place operations, ``load_state_dict``, new parameters, optimizers) are noticed
    without it; writes through ``.data`` or numpy, and fused optimizers, are not.

    Args:
        compiled: what ``torch.compile(model, backend="tdc")`` gave, or the module itself.

    Raises:
        ModelError: it was not compiled by TDC or not called yet, or its weights were released.
    """
    for part in _parts_of(compiled):
        part.done.wait()
        part.refresh()


def compiled_report(compiled: nn.Module) -> Report | None:
    """What was done to a compiled model, all its graphs together; None if it is none of TDC's.

    Raises ModelError, with the reason, if nothing was done yet or all of it failed.
    """
    found = _parts_of(compiled, or_none=True)
    made = [part.outcome.report for part in found if part.outcome is not None]
    if made:
        return made[0] if len(made) == 1 else _together(made)
    if not found:
        return None
    part = found[0]
    if part.error is not None:
        raise ModelError(f"the model runs dense: {part.error}") from part.error
    raise ModelError(f"there is no report yet: the model is {part.state} ({part.lacking} more call(s) to gather)")


def _together(reports: list[Report]) -> Report:
    first = reports[0]
    before = sum((r.model_before for r in reports), Cost(0, 0, 0))
    after = sum((r.model_after for r in reports), Cost(0, 0, 0))
    sites = tuple(chain.from_iterable(r.sites for r in reports))
    remarks = tuple(dict.fromkeys(chain.from_iterable(r.remarks for r in reports)))
    return Report(first.door, first.metric, first.statistics, first.target, first.budget, sites, before, after, remarks)


def _parts_of(compiled: nn.Module, *, or_none: bool = False) -> list[Part]:
    """The parts whose weights a model holds."""
    if not isinstance(compiled, nn.Module):
        raise ModelError(
            f"give the module that was compiled (for a compiled function, the module inside); got "
            f"{type(compiled).__name__}"
        )
    known = sys.modules.get("tdc._parts")
    ids = {id(tensor) for tensor in chain(compiled.parameters(), compiled.buffers())}
    everything = [] if known is None else known.parts()
    found = [part for part in everything if any(ref() is not None and id(ref()) in ids for ref in part.weights)]
    if not found and not or_none:
        raise ModelError(
            "this model has no graph that was compiled by TDC: torch.compile(model, backend='tdc'), and call it once "
            "without gradients"
        )
    return found


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
    if plan is None and budget is None:
        raise OptionError("give budget= (for example budget='params=0.5') or plan=, one of the two")
    options = _options(budget, metric, target, allow, exclude, allocation, seed, progress)
    calibration = _peek(None, calibration)[1]
    opened = open_exported(program)
    before = opened.cost()
    unit = _realized(_unit(opened, options, calibration, statistics, probe), plan)
    made = _report(unit, before, opened.cost_of(unit.result))
    small = export_again(program, opened, unit.result)
    assert unit.plan is not None
    small.__dict__[RECORD] = (made, unit.plan)
    return small
