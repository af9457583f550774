"""The options of the backend: the keywords of :func:`tdc.compress`, and those of a compiled model."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from . import targets
from ._common import check_decided, checked_options
from ._lowering import INNER, Lowering
from .errors import OptionError
from .ir import Plan
from .options import Options, takes_budget
from .statistics import Statistics
from .targets import Target

__all__ = ["Settings", "log"]

log = logging.getLogger("tdc")
DEFAULT_BUDGET, DEFAULT_CALLS = "params=0.7", 8
_ON_UPDATE, _TRAINING, _FREEZING = ("refit", "error"), ("dense", "error"), ("auto", "on", "off")
_KERNELS = ("auto", "off")
_OPTIONS: dict[str, Any] = {
    "budget": None,
    "metric": "auto",
    "target": "auto",
    "allow": None,
    "exclude": (),
    "allocation": "lagrangian",
    "seed": 0,
    "progress": False,
}
_NOT_HERE = {
    "workload": "what is timed are the model's calls",
    "inplace": "torch.compile leaves the module as it is",
    "example_inputs": "the model's calls are the examples",
    "backend": "it is an argument of torch.compile",
    "mode": "it is an argument of torch.compile",
}


@dataclass(frozen=True, eq=False)
class Settings:
    """What the user asked for.

    ``calibrate_calls``: so many calls run dense and are kept as calibration data; then the plan is made and fitted in
    the background. 0: at compilation. ``inner``: the compiler of the graphs, inductor, aot_eager or eager. ``strict``:
    an error instead of the dense graph. ``on_update``: refit or error, when a weight was changed. ``release_weights``:
    free the memory of the replaced weights. ``training``: dense or error, where gradients are wanted. ``freezing``: let
    Inductor hold the weights as constants: auto (measured), on, off. ``kernels``: TDC's own operators in the graphs,
    auto (where they are measured to be faster than torch's) or off. ``cache``: a folder where fitted factors are kept,
    so that the same plan on the same weights is not fitted again in another process.
    """

    options: Options
    plan: Plan | None = None
    statistics: Statistics | None = None
    calibration: Any = None
    probe: Any = None
    calibrate_calls: int = 0
    inner: str = "inductor"
    mode: str | None = None
    strict: bool = False
    on_update: str = "refit"
    release_weights: bool = False
    training: str = "dense"
    freezing: str = "auto"
    kernels: str = "auto"
    cache: Path | None = None
    given: Any = None
    """The user's own mapping: kept, so that its identity stays its own."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """What that mapping held."""
    warned: list[bool] = field(default_factory=list)
    """Not empty once it was said that gradients make the model run dense."""
    machine: Target | None = None
    """The target, looked up where the model is compiled: what is known of it depends on the threads that torch uses,
    and planning in the background uses one.
    """

    @property
    def lowering(self) -> Lowering:
        return Lowering(self.inner, self.mode, self.freezing)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, mode: str | None) -> Settings:
        """Raises OptionError (or the error of a file that cannot be read) for anything that cannot be right."""
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"options= takes a dict; got {type(given).__name__}")
        chosen = dict(given or {})
        _check_names(chosen)
        plan, statistics = chosen.pop("plan", None), chosen.pop("statistics", None)
        if isinstance(plan, (str, Path)):
            plan = Plan.load(plan)
        if plan is not None and not isinstance(plan, Plan):
            raise OptionError(f"plan= takes what tdc.plan returns, or a path; got {type(plan).__name__}")
        if isinstance(statistics, (str, Path)):
            statistics = Statistics.load(statistics)
        if statistics is not None and not isinstance(statistics, Statistics):
            raise OptionError(
                f"statistics= takes what tdc.calibrate returns, or a path; got {type(statistics).__name__}"
            )
        budgeted = takes_budget(chosen.get("allocation", Options.allocation))
        if plan is None and chosen.get("budget") is None and budgeted:
            chosen["budget"] = DEFAULT_BUDGET
            data = statistics is not None or chosen.get("calibration") is not None
            chosen.setdefault("calibrate_calls", 0 if data else DEFAULT_CALLS)
            _say_the_default(chosen["calibrate_calls"])
        options = checked_options(**{name: chosen.pop(name, default) for name, default in _OPTIONS.items()})
        check_decided(options, plan)
        if chosen.get("cache") is not None:
            chosen["cache"] = _folder(chosen["cache"])
        machine = targets.get(options.target)
        made = cls(
            options, plan, statistics, **chosen, mode=mode, given=given, entries=dict(given or {}), machine=machine
        )
        made._check_values()
        return made

    def is_of(self, given: Mapping[str, Any] | None) -> bool:
        """Whether the user's mapping still holds what it did."""
        now = dict(given or {})
        return now.keys() == self.entries.keys() and all(now[name] is value for name, value in self.entries.items())

    def _check_values(self) -> None:
        for name, known in (
            ("inner", INNER),
            ("on_update", _ON_UPDATE),
            ("training", (*_TRAINING, "factors")),
            ("freezing", _FREEZING),
            ("kernels", _KERNELS),
        ):
            if getattr(self, name) not in known:
                raise OptionError(f"unknown {name} {getattr(self, name)!r}. Known: {', '.join(known)}")
        for name in ("strict", "release_weights"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False; got {getattr(self, name)!r}")
        calls = self.calibrate_calls
        if not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
            raise OptionError(f"calibrate_calls must be a whole number, 0 or more; got {calls!r}")
        if self.training == "factors":
            raise OptionError(
                "training='factors' is what the module door does: tdc.compress(model, ...) gives a module with "
                "trainable factors, which torch.compile takes as any other"
            )
        if sum(given is not None for given in (self.calibration, self.statistics)) + bool(calls) > 1:
            raise OptionError("give calibration=, statistics= or calibrate_calls=, one of the three")
        measured = self.plan.metric if self.plan is not None else self.options.metric
        if measured == "input" and self.statistics is None and self.calibration is None and not calls:
            raise OptionError("the input metric needs statistics=, calibration= or calibrate_calls=")


def _folder(given: object) -> Path:
    if not isinstance(given, (str, Path)):
        raise OptionError(f"cache= takes a folder; got {type(given).__name__}")
    path = Path(given)
    if path.exists() and not path.is_dir():
        raise OptionError(f"cache= takes a folder; {path} is a file")
    return path


_KNOWN = set(_OPTIONS) | {field.name for field in fields(Settings)} - {"options", "mode", "given", "warned", "machine"}
_said: list[int] = []


def _check_names(chosen: Mapping[str, Any]) -> None:
    for name in chosen:
        if name in _KNOWN:
            continue
        if name in _NOT_HERE:
            raise OptionError(f"{name} is no option of the backend: {_NOT_HERE[name]}")
        near = difflib.get_close_matches(str(name), sorted(_KNOWN), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(_KNOWN))}"
        raise OptionError(f"unknown option {name!r} of the backend 'tdc'. {hint}")


def _say_the_default(calls: int) -> None:
    if not _said:
        _said.append(calls)
        how = f", with the statistics of the first {calls} calls, which run dense" if calls else ""
        log.warning(
            "tdc: no budget and no plan were given: the weights are brought to %s of their parameters%s. Choose by "
            "torch.compile(..., options={'budget': 'params=0.5', 'calibrate_calls': 8}); tdc.report(model) tells what "
            "was done.",
            DEFAULT_BUDGET.partition("=")[2],
            how,
        )
