"""Running passes in a row, each one's contract checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tdc.errors import VerificationError

from .base import Pass, Unit
from .bind_plan import BindPlan
from .calibrate import Calibrate
from .check_error import CheckError
from .choose_plan import ChoosePlan
from .find_sites import FindSites
from .fit_factors import FitFactors
from .fold_permutations import FoldPermutations
from .group_sites import GroupSites
from .lower_blocks import LowerBlocks
from .predict_time import PredictTime
from .propose_hidden import ProposeHidden
from .propose_joint import ProposeJoint
from .propose_layouts import ProposeLayouts
from .rewrite_graph import RewriteGraph
from .time_layouts import TimeLayouts

__all__ = ["APPLYING", "CHOOSING", "COMPRESSING", "LOWERING", "PLANNING", "PROPOSING", "REALIZING", "Pipeline"]

PROPOSING: tuple[Pass, ...] = (
    FindSites(),
    GroupSites(),
    Calibrate(),
    ProposeLayouts(),
    ProposeJoint(),
    ProposeHidden(),
    TimeLayouts(),
)
CHOOSING: tuple[Pass, ...] = (ChoosePlan(), FoldPermutations(), PredictTime())
PLANNING = PROPOSING + CHOOSING
LOWERING: tuple[Pass, ...] = (LowerBlocks(), RewriteGraph())
REALIZING: tuple[Pass, ...] = (FitFactors(), CheckError(), *LOWERING)
COMPRESSING = PLANNING + REALIZING
APPLYING = (FindSites(), GroupSites(), Calibrate(), BindPlan(), FoldPermutations(), PredictTime(), *REALIZING)

Hook = Callable[[Pass, Unit, float], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. ``after`` is called with each pass, the unit after it and the seconds it took."""

    passes: Sequence[Pass]
    after: Hook | None = None

    def run(self, unit: Unit) -> Unit:
        """Run all passes. A pass that changes the program although it does not say so is a VerificationError."""
        with torch.inference_mode(False):  # factors that are made in inference mode could never be trained
            return self._run(unit)

    def _run(self, unit: Unit) -> Unit:
        for step in self.passes:
            step.requires(unit)
            start = time.monotonic()
            done = step.run(unit)
            if done.program is not unit.program:
                raise VerificationError(f"the pass {step.name} has exchanged the program")
            if not step.touches_model and done.result is not unit.result:
                raise VerificationError(f"the pass {step.name} made a result although it does not touch the model")
            step.ensures(unit, done)
            unit = done
            if self.after is not None:
                self.after(step, unit, time.monotonic() - start)
        return unit
