"""Into which sizes the axes of a matrix are split, for the formats that split them."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

__all__ = ["balanced", "led", "measured"]

_PADDING = 0.05


@lru_cache(maxsize=4096)
def balanced(size: int, parts: int) -> tuple[int, ...] | None:
    """``parts`` factors, each at least 2, of ``size`` or of a number at most 5 % above it; None if there are none.

    At equal ranks, what a format stores grows with the sum of the factors, and its work with the padded size: the
    least product of the two wins, then the least padding. ``balanced(1001, 2) == (28, 36)``, of 1008 and not of
    7 * 11 * 13; ``balanced(13, 2)`` is None, since 13 is a prime and 14 is 8 % more. Ascending.
    """
    best: tuple[float, int, tuple[int, ...]] | None = None
    for padded in range(size, int(size * (1 + _PADDING)) + 1):
        factors = _least_sum(padded, parts, 2)
        if factors is not None:
            entry = (sum(factors) * padded, padded, factors)
            best = entry if best is None else min(best, entry)
    return best[2] if best is not None else None


def _least_sum(number: int, parts: int, least: int) -> tuple[int, ...] | None:
    """The ascending factors of a number, from ``least`` on, with the least sum."""
    if parts == 1:
        return (number,) if number >= least else None
    found = []
    first = least
    while first**parts <= number:
        rest = _least_sum(number // first, parts - 1, first) if number % first == 0 else None
        if rest is not None:
            found.append((first, *rest))
        first += 1
    return min(found, key=lambda factors: (sum(factors), factors), default=None)


def led(size: int, first: int) -> tuple[int, int] | None:
    """``first`` and what it is to be multiplied by for at least ``size``; None if that is more than 5 % padding, or
    the second factor is less than the first.
    """
    second = ceil(size / first)
    return (first, second) if first <= second and first * second <= size * (1 + _PADDING) else None


def measured(names: str, outputs: tuple[int, ...] | None, inputs: tuple[int, ...] | None) -> dict[str, int]:
    """Sizes by axis name; ``names``: ``"o1 o2 i1 i2"``. Empty where one side cannot be split."""
    if outputs is None or inputs is None:
        return {}
    return dict(zip(names.split(), (*outputs, *inputs), strict=True))
