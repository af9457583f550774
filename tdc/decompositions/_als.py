"""Alternating least squares in the metric, for the equation of any decomposition.

Each factor in turn is solved for, or improved, with the others as they are (:mod:`._quadratic`). The error never rises
but by rounding; the best factors are kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import log

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._quadratic import EXACT, Problem
from .base import Decomposition, Factors

__all__ = ["AlternatingDecomposition", "Problem", "refine"]

_LEAST_GAIN = 2e-3
_SMALL = 1 << 14
_SWEEP_WORK = 1 << 37
"""Multiply-adds of a sweep, about, up to which all sweeps asked for are made; of more, as many as take no longer."""


def refine(
    factors: Factors,
    layout: Layout,
    weight: Tensor,
    metric: Metric,
    *,
    sweeps: int = 12,
    names: Sequence[str] | None = None,
) -> tuple[Factors, float]:
    """Alternating least squares from a start: ``(factors, relative squared error)``, never worse than the start.

    Stops where a sweep gains less than 0.2 % of the error. For big weights there are fewer sweeps, in the input metric
    at least one. ``names``: the factors to fit, in this order; all by default. The factors of each piece come with
    equal norms.
    """
    problem = Problem(weight, layout, metric)
    values = problem.apart(factors)
    best, least = values, problem.error(values)
    start, chosen = least, [*(names if names is not None else layout.rebuild.factors)]
    if least <= EXACT:
        sweeps = 0
    for _ in range(_affordable(problem, chosen, sweeps) if sweeps else 0):
        for name in chosen:
            values = {**values, name: problem.update(name, values)}
        values = _balanced(problem, values)
        error = problem.error(values)
        if not error < least:
            break
        gained, best, least = least - error, values, error
        if least <= EXACT or gained < _LEAST_GAIN * least:
            break
    if least == start:
        return {name: factors[name] for name in layout.rebuild.factors}, start
    return problem.stored(best), least


def _affordable(problem: Problem, names: Sequence[str], sweeps: int) -> int:
    most = sweeps * _SWEEP_WORK // max(1, problem.work(names))
    return min(sweeps, max(most, 0 if problem.second is None else 1))


def _balanced(problem: Problem, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every piece with its norm spread evenly over its factors."""
    values = dict(values)
    for piece in problem.layout.rebuild.pieces:
        norms = [float(values[name].norm()) for name in piece.operands]
        if all(norm > 0 for norm in norms):
            mean = torch.tensor(norms, dtype=torch.float64).log().mean().exp()
            for name, norm in zip(piece.operands, norms, strict=True):
                values[name] = values[name] * (float(mean) / norm)
    return values


class AlternatingDecomposition(Decomposition):
    """A decomposition without a closed form in the metric: a start, then alternating least squares.

    Its errors are those of short fits at a few points of the lattice, of small weights at all of them, and between them
    by interpolation (the logarithm of the error over that of the stored numbers).
    """

    estimates = True
    probes = 5
    """Points of the lattice at which a fit is made to predict errors."""

    @abstractmethod
    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        """Factors to begin with, float64, shaped as ``layout.shapes``; exact at full rank."""

    def finish(self, factors: Factors, layout: Layout) -> Factors:
        """The factors in this format's convention of sign and scale; the weight that they rebuild stays."""
        return factors

    def fit(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        return self._fit(weight, layout, metric, sweeps=12)[0]

    def _fit(self, weight: Tensor, layout: Layout, metric: Metric, sweeps: int) -> tuple[Factors, float]:
        factors, error = refine(self.start(weight, layout, metric), layout, weight, metric, sweeps=sweeps)
        return self.finish(factors, layout), error

    def errors(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        lattice: Sequence[Mapping[str, int]],
        variant: str,
    ) -> list[float]:
        if not lattice:
            return []
        layouts = [self.layout(axes, ranks, variant) for ranks in lattice]
        stored = [float(layout.params) for layout in layouts]
        places = sorted(range(len(lattice)), key=lambda k: stored[k])
        count = len(places) if weight.numel() <= _SMALL else min(self.probes, len(places))
        step = max(1, len(places) - 1) / max(1, count - 1)
        probed = sorted({places[round(k * step)] for k in range(count)}, key=lambda k: stored[k])
        found: list[tuple[float, float]] = []
        for k in reversed(probed):
            error = min(1.0, self._fit(weight, layouts[k], metric, sweeps=2)[1])
            found.insert(0, (stored[k], max([error, *(e for _, e in found[:1])])))
        return [_between(found, numbers) for numbers in stored]


def _between(found: Sequence[tuple[float, float]], numbers: float) -> float:
    """The error at that many stored numbers, from those at fewer and at more."""
    above = next((k for k, (n, _) in enumerate(found) if n >= numbers), len(found) - 1)
    (n1, e1), (n0, e0) = found[above], found[max(above - 1, 0)]
    if numbers == n1 or e1 == e0:
        return e1
    share = (log(numbers) - log(n0)) / (log(n1) - log(n0))
    if min(e0, e1) <= 0:
        return (1 - share) * e0 + share * e1
    return float(torch.exp(torch.tensor((1 - share) * log(e0) + share * log(e1))))
