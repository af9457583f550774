"""What a pass is, and what flows through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from tdc.frontends.program import Change, Program
from tdc.ir import Block, Candidate, Plan, Remark, Site
from tdc.options import Options
from tdc.statistics import Statistics, without_padding
from tdc.targets import Target

__all__ = ["Members", "Pass", "SiteErrors", "Unit"]

Members = tuple[Candidate, ...]
"""The candidates of a joint group, one a site, in topological order."""


@dataclass(frozen=True)
class SiteErrors:
    """Relative squared errors of stored factors, measured after rounding: in the plan's metric, and of the weight.

    ``cancellation``: see :func:`tdc.decompositions.cancellation`.
    """

    metric: float
    weight: float
    cancellation: float = 1.0


@dataclass(frozen=True)
class Unit:
    """Everything known about one compression; passes take one and give one. Mappings are keyed by ``site.order``."""

    program: Program
    target: Target
    options: Options
    calibration: Any = None
    probe: Any = None
    statistics: Statistics | None = None
    anchors: tuple[Any, ...] = ()
    """Calibration batches, as the program reads them, for fits on what the model that is cut makes of them."""
    importance: tuple[Mapping[int, Tensor], ...] = ()
    """Of each of the anchors: ``site.order`` -> how much the rows that the site reads matter, where that is known."""
    sites: tuple[Site, ...] = ()
    candidates: Mapping[int, tuple[Candidate, ...]] = field(default_factory=dict)
    joint: Mapping[int, tuple[Members, ...]] = field(default_factory=dict)
    """Group number -> what its sites can do together."""
    workload: tuple[tuple[Any, float], ...] = ()
    """Batches, as the program reads them, and how often each is run, where that is what is timed."""
    timing: tuple[float, float] | None = None
    """Seconds of a run of the dense model, and what part of them is spent in the sites, where it was measured."""
    plan: Plan | None = None
    factors: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    errors: Mapping[int, SiteErrors] = field(default_factory=dict)
    anchored: frozenset[int] = frozenset()
    """Sites that were fitted to inputs that the sites before them, already cut, give: their error by itself, on the
    inputs of the dense model, is no longer what was minimised."""
    shifts: Mapping[int, Tensor] = field(default_factory=dict)
    """What is added to the bias of sites whose metric leaves the mean of the error to it."""
    blocks: Mapping[int, Block] = field(default_factory=dict)
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Group number -> the hidden units that are kept, in rising order."""
    output_orders: Mapping[int, Tensor] = field(default_factory=dict)
    """For sites whose gather is folded, or that give fewer hidden units: entry k of the output that they give is entry
    ``order[k]`` of the dense one."""
    remarks: tuple[Remark, ...] = ()
    result: Any = None

    def having(self, **changes: Any) -> Unit:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def outputs(self, batch: Any, changes: Mapping[int, Change] | None = None) -> dict[str, Tensor]:
        """Of the program, as they are compared: without those at padding."""
        return without_padding(self.program.outputs(batch, changes or {}), self.program.unpadded(batch))

    def remarking(self, *remarks: Remark) -> Unit:
        """A copy with more remarks, none twice."""
        return replace(self, remarks=tuple(dict.fromkeys((*self.remarks, *remarks))))


@dataclass(frozen=True)
class Pass(ABC):
    """A pure function on units. Only a pass that says ``touches_model`` may change what the program holds."""

    name: ClassVar[str]
    touches_model: ClassVar[bool] = False

    def requires(self, unit: Unit) -> None:
        """Raise VerificationError if the unit is not what the pass needs."""

    @abstractmethod
    def run(self, unit: Unit) -> Unit:
        """The unit after this pass."""

    def ensures(self, before: Unit, after: Unit) -> None:
        """Raise VerificationError if the pass has broken a promise."""
