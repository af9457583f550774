"""Fitting on what the model that is already cut makes of the data, against what the dense one makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tdc.frontends.program import Change
from tdc.ir import Candidate, Metric, Site
from tdc.memory import give_back
from tdc.statistics import SiteStatistics
from tdc.statistics.patches import unpadded_rows

from ._errors import optimism, relative_error
from ._pair import Pair
from .base import Unit
from .propose_layouts import lowered, metric_name, metric_of

__all__ = ["Anchored", "anchors_of"]

_MEMORY = 3 << 30
"""Bytes that the activations of all runs may take together, about."""
_LIVE = 2
"""Tensors of the size of a site's input that a run holds at a time, about."""

Fitted = Callable[[Sequence[Candidate], Sequence[Tensor], Sequence[Metric]], list[tuple[Mapping[str, Tensor], Tensor]]]
"""Fits a candidate, or those of a joint group, to weights (float64, canonical) in their metrics: of each the stored
factors and the weight that they rebuild, no factors where they overflow."""


def _can_anchor(entry: SiteStatistics | None, site: Site) -> bool:
    """Whether the inputs of the site are known, and it is met once."""
    return entry is not None and entry.side == "input" and site.uses == 1


def anchors_of(unit: Unit, known: Mapping[int, SiteStatistics]) -> list[Any]:
    """As many of the calibration batches as fit in the memory, two runs of each; none if it is not even two."""
    if unit.statistics is None or not unit.anchors:
        return []
    batches = unit.statistics.batches
    largest = max((e.seen / batches * e.site.matrix[2] / _taps(e.site) for e in known.values()), default=0.0)
    most = int(_MEMORY / max(1.0, 2 * 4 * _LIVE * largest))
    return list(unit.anchors[:most]) if most > 1 else []


def _taps(site: Site) -> int:
    """Window positions of a convolution's patch: its input holds each number about once for each step of the window."""
    taps = 1
    for window in site.windows:
        taps *= max(1, window.size // window.stride)
    return taps


@dataclass
class Anchored:
    """Visits the sites in the order in which the batches reach them; fits those that are planned.

    With x the input of a site in the dense model and z that in the model that is cut up to there, the weight to fit is
    the least-squares solution of ``B z = W x``, ``B = W + W E[(x - z) z^T] (E[z z^T] + ridge)^-1``, in the
    metric of ``E[z z^T]``: so ``E ||W x - W_hat z||^2`` is least (AA-SVD, 2026); in the metric ``fisher`` with each row
    at its importance. The ridge draws B to W; it is that with which the B of one half of the batches loses least on the
    other half (see :meth:`._pair.Pair.target`). Where a site has a bias it takes up the means,
    ``b + W E[x] - W_hat E[z]``. Where x and z are the same, up to rounding, B is W.

    Where the output is added to something, s in the dense model and t in the other (a residual connection), the sum is
    what the layers behind it read: then ``E ||(W x + s) - (W_hat z + t)||^2`` is least, with ``E[(s - t) z^T]`` added
    to ``W E[(x - z) z^T]``, and ``E[s - t]`` to what the bias takes up.

    Where such a fit loses all that the site gives in the dense model, it is fitted by itself.
    """

    unit: Unit
    planned: Mapping[int, Candidate]
    known: Mapping[int, SiteStatistics]
    metric: Callable[[Site, Tensor], Metric]
    fitted: Fitted
    advance: Callable[[], None]
    factors: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
    overflown: set[int] = field(default_factory=set)
    anchored: set[int] = field(default_factory=set)
    changes: dict[int, Change] = field(default_factory=dict)
    """The weights that the factors rebuild, and what the biases take up."""
    _last: tuple[list[tuple[int, int]], tuple[Tensor, ...], Pair] | None = None

    def __call__(
        self, site: Site, activations: Sequence[Tensor], beside: Sequence[Tensor | None] = ()
    ) -> Change | None:
        choice = self.planned.get(site.order)
        if choice is not None and site.order not in self.changes and site.order not in self.overflown:
            joint = choice.joint
            group = [c for c in self.planned.values() if joint and c.joint and c.joint.group == joint.group]
            self._fit(sorted(group, key=lambda c: c.site.order) or [choice], activations, beside)
        return self.changes.get(site.order)

    def _fit(
        self, choices: Sequence[Candidate], activations: Sequence[Tensor], beside: Sequence[Tensor | None]
    ) -> None:
        """One site, or those of a joint group, which read the same activations."""
        sites = [choice.site for choice in choices]
        weights = [self.unit.program.weight(site) for site in sites]
        doubles = [weight.double() for weight in weights]
        metrics = [self.metric(site, double) for site, double in zip(sites, doubles, strict=True)]
        anchor, dense = None, (doubles, metrics)
        if activations and self.changes and all(_can_anchor(self.known.get(site.order), site) for site in sites):
            moments = self._moments(sites[0], activations, beside if len(sites) == 1 else ())
            anchor = moments if moments.moved else None
        if anchor is not None:
            pairs = [anchor.target(double, metric) for double, metric in zip(doubles, metrics, strict=True)]
            doubles, metrics = [double for double, _ in pairs], [metric for _, metric in pairs]
            self.anchored |= {site.order for site in sites}
        fits = self.fitted(choices, doubles, metrics)
        if anchor is not None and any(self._loses_all(*row) for row in zip(choices, weights, fits, strict=True)):
            anchor, (doubles, metrics) = None, dense
            self.anchored -= {site.order for site in sites}
            fits = self.fitted(choices, doubles, metrics)
        for site, weight, metric, (factors, rebuilt) in zip(sites, weights, metrics, fits, strict=True):
            self.advance()
            if not factors:
                self.overflown.add(site.order)
                continue
            self.factors[site.order] = factors
            shift = None if metric.mean is None else _shift(weight.double(), rebuilt, anchor, metric.mean)
            if shift is not None and anchor is not None:
                self.shifts[site.order] = shift
            self.changes[site.order] = Change(rebuilt.to(weight.dtype), shift)
        give_back()

    def _loses_all(self, choice: Candidate, weight: Tensor, fit: tuple[Mapping[str, Tensor], Tensor]) -> bool:
        """Whether a fit to what the cut model makes of the data is worse than none on that of the dense one."""
        site, (factors, rebuilt), entry = choice.site, fit, self.known.get(choice.site.order)
        if not factors:
            return False
        metric = metric_of(self.unit, site, entry, weight.double(), fitting=False)
        lost = relative_error(weight.double(), rebuilt.double(), metric, site)
        return not optimism(choice, lowered(self.unit.target, choice)[0], entry) * lost < 1

    def _moments(self, site: Site, activations: Sequence[Tensor], beside: Sequence[Tensor | None]) -> Pair:
        """Worked out once for linear sites that read the same activations one after the other."""
        importance = self._importance(site, activations[: len(activations) // 2])
        if site.kind.is_conv or any(tensor is not None for tensor in beside):
            return Pair.of(site, activations, importance, beside)
        state = [(id(a), a._version) for a in activations]
        if self._last is None or self._last[0] != state:
            self._last = (state, tuple(activations), Pair.of(site, activations, importance))
        return self._last[2]

    def _importance(self, site: Site, dense: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the rows of each batch; where that is not known, 0 for padding and 1 for others."""
        fisher = metric_name(self.unit) == "fisher"
        found: list[Tensor | None] = []
        for k, (batch, activation) in enumerate(zip(self.unit.anchors, dense, strict=False)):
            known = self.unit.importance[k].get(site.order) if fisher and k < len(self.unit.importance) else None
            real = unpadded_rows(site, activation, self.unit.program.unpadded(batch)) if known is None else None
            found.append(known if real is None else real.float())
        return found


def _shift(weight: Tensor, rebuilt: Tensor, moments: Pair | None, mean: Tensor) -> Tensor:
    """``W E[x] - W_hat E[z]``."""
    if moments is None:
        return _response(weight, mean) - _response(rebuilt, mean)
    shift = _response(weight, moments.mean_x) - _response(rebuilt, moments.mean_z)
    return shift if moments.added is None else shift + moments.added[1].flatten()


def _response(weight: Tensor, mean: Tensor) -> Tensor:
    """``W m`` of a weight (g o, i, ...) for means (n) or (g, n), flat."""
    columns = mean.reshape(-1, mean.shape[-1], 1)
    return (weight.reshape(len(columns), -1, columns.shape[1]) @ columns).flatten()
