"""What users do with models that ``torch.compile(model, backend="tdc")`` gave."""

from __future__ import annotations

import sys
import time
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import ModelError
from .ir import Cost
from .report import Report

if TYPE_CHECKING:
    from ._parts import Part

__all__ = ["compiled_report", "refresh", "wait"]


def wait(compiled: nn.Module, *, timeout: float | None = None) -> None:
    """Wait until a model compiled with ``calibrate_calls`` has been planned, fitted and exchanged (or has failed to be,
    which :func:`report` tells).

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


def _options_of(compiled: nn.Module) -> Any:
    """The mapping of options that a module was compiled with, by which torch has no public way to ask; else None."""
    try:
        from torch._dynamo.eval_frame import innermost_backend

        context: Any = compiled.dynamo_ctx
        backend: Any = innermost_backend(context.callback)
        return backend.kwargs.get("options")
    except (ImportError, AttributeError):
        return None


def _parts_of(compiled: nn.Module, *, or_none: bool = False) -> list[Part]:
    """The parts whose weights a model holds; where it was compiled several times, those of this time."""
    if not isinstance(compiled, nn.Module):
        raise ModelError(
            f"give the module that was compiled (for a compiled function, the module inside); got "
            f"{type(compiled).__name__}"
        )
    known = sys.modules.get("tdc._parts")
    ids = {id(tensor) for tensor in chain(compiled.parameters(), compiled.buffers())}
    everything = [] if known is None else known.parts()
    found = [part for part in everything if any(ref() is not None and id(ref()) in ids for ref in part.weights)]
    given = _options_of(compiled)
    found = [part for part in found if part.settings.given is given] or found
    if not found and not or_none:
        raise ModelError(
            "this model has no graph that was compiled by TDC: torch.compile(model, backend='tdc'), and call it once "
            "without gradients"
        )
    return found
