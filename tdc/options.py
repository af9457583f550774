"""What the user asks for, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import OptionError

__all__ = ["ALLOCATIONS", "Options"]

ALLOCATIONS = ("lagrangian", "uniform")
METRICS = ("auto", "weight", "input", "fisher")


@dataclass(frozen=True)
class Options:
    """``metric``: weight, input, fisher, or auto (the best that the statistics serve). ``allow``: names of
    decompositions, () for all.

    ``exclude``: site names or shell patterns that stay dense. ``allocation``: lagrangian, or uniform (every site
    keeps the same fraction, rank rounded down to an integer).
    """

    budget: object = None
    metric: str = "auto"
    target: str = "auto"
    allow: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allocation: str = "lagrangian"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise OptionError(f"unknown metric {self.metric!r}. Known: {', '.join(METRICS)}")
        if self.allocation not in ALLOCATIONS:
            raise OptionError(f"unknown allocation {self.allocation!r}. Known: {', '.join(ALLOCATIONS)}")
        if not isinstance(self.seed, int):
            raise OptionError(f"seed must be an integer; got {self.seed!r}")

    @staticmethod
    def names(given: str | Iterable[str] | None, what: str) -> tuple[str, ...]:
        """One name or several as a tuple. Raises OptionError for anything else."""
        if given is None:
            return ()
        names = (given,) if isinstance(given, str) else tuple(given)
        if what == "allow" and not names:
            raise OptionError("allow is empty: name at least one decomposition, or leave it out for all")
        if not all(isinstance(name, str) for name in names):
            raise OptionError(f"{what} must be a name or a list of names; got {given!r}")
        return names
