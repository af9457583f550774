"""Ranks that need no budget: what the singular values of a weight alone suggest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, exp, log, sqrt

import numpy as np

from ..errors import OptionError
from ..options import read_allocation

__all__ = ["Rule", "energy", "evbmf", "rule"]

Rule = Callable[[Sequence[float], int, int], int]
"""``(singular values, rows, columns) -> rank``; 0 where nothing is worth a rank."""

_GRID = 64
_STEPS = 40
_GOLDEN = (sqrt(5) - 1) / 2


def energy(singular_values: Sequence[float], keep: float = 0.95) -> int:
    """The least rank that keeps that share of the squared norm; 0 for a weight of zeros."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a share in (0, 1]; got {keep}")
    squares = _squares(singular_values)
    kept = np.cumsum(squares)
    if not kept.size or kept[-1] <= 0:
        return 0
    return int(np.argmax(kept >= keep * kept[-1])) + 1


def evbmf(singular_values: Sequence[float], rows: int, columns: int) -> int:
    """The rank by empirical variational Bayes: how many singular values stand out of noise of unknown variance.

    The global analytic solution of Nakajima, Sugiyama, Babacan and Tomioka (2013), with L <= M the sizes,
    ``alpha = L / M``, ``t = 2.5129 sqrt(alpha)`` and ``limit = (1 + t)(1 + alpha / t)``: a singular value s counts
    where ``x = s^2 / (M v)`` is above the limit, and the variance v of the noise minimises ::

        sum_{x <= limit} (x - ln x)
        + sum_{x > limit} (x - tau + ln((tau + 1) / x) + alpha ln(tau / alpha + 1)) + (L - H) ln v

    with ``tau = (x - 1 - alpha + sqrt((x - 1 - alpha)^2 - 4 alpha)) / 2`` and H the number of singular values that are
    not zero. 0 where all is noise. On spectra without a floor of noise it suggests a rank all the same: a first guess.
    """
    if len(singular_values) > min(rows, columns):
        raise ValueError(f"{len(singular_values)} singular values of a {rows} x {columns} weight")
    small, large = min(rows, columns), max(rows, columns)
    squares = _squares(singular_values)
    peak = float(squares.max(initial=0.0))
    if peak == 0:
        return 0
    squares = squares[squares > peak * (large * np.finfo(float).eps) ** 2] / peak
    alpha = small / large
    t = 2.5129 * sqrt(alpha)
    limit = (1 + t) * (1 + alpha / t)
    rest = squares[min(ceil(small / (1 + alpha)) - 1, squares.size) :]
    if not rest.size:
        return int(squares.size)  # exact low rank: there is no noise
    highest = float(squares.sum()) / (small * large)
    lowest = max(float(rest[0]) / (large * limit), float(rest.mean()) / large)
    variance = _least(squares, small, large, alpha, limit, lowest, max(lowest, highest))
    return int(np.count_nonzero(squares > large * variance * limit))


_RULES: Mapping[str, Callable[[float], Rule]] = {
    "energy": lambda share: lambda values, rows, columns: energy(values, share),
    "evbmf": lambda share: evbmf,
}


def rule(allocation: str) -> Rule:
    """The rule of an allocation that takes no budget, ``evbmf``, ``energy`` or ``energy=0.9``.

    Raises OptionError for another one.
    """
    name, share = read_allocation(allocation)
    if name not in _RULES:
        raise OptionError(f"the allocation {allocation!r} suggests no ranks: it takes a budget")
    return _RULES[name](share)


def _squares(singular_values: Sequence[float]) -> np.ndarray:
    values = np.sort(np.abs(np.asarray(singular_values, dtype=np.float64)))[::-1]
    peak = values.max(initial=0.0)
    return np.square(values / peak if peak > 0 else values)


def _least(
    squares: np.ndarray, small: int, large: int, alpha: float, limit: float, lowest: float, highest: float
) -> float:
    """The variance of the least free energy: the best of a grid, then golden sections around it."""

    def at(place: float) -> float:
        x = squares / (large * exp(place))
        noise, signal = x[x <= limit], x[x > limit]
        tau = signal - (1 + alpha)
        tau = (tau + np.sqrt(np.maximum(tau**2 - 4 * alpha, 0))) / 2
        above = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
        return float((noise - np.log(noise)).sum() + above.sum() + (small - squares.size) * place)

    grid = np.linspace(log(lowest), log(highest), _GRID)
    best = int(np.argmin([at(place) for place in grid]))
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    for _ in range(_STEPS):
        width = (right - left) * _GOLDEN
        if at(right - width) <= at(left + width):
            right = left + width
        else:
            left = right - width
    return exp((left + right) / 2)
