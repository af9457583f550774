"""What the user asks for, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import BudgetError, OptionError

__all__ = ["BUDGETED", "SUGGESTING", "Options", "named_allocation", "read_allocation", "takes_budget"]

BUDGETED = ("lagrangian", "uniform")
"""Allocations of a budget over the sites."""
SUGGESTING = ("energy", "evbmf")
"""Allocations that take no budget: the singular values of each weight suggest its ranks."""
_SHARES = {"energy": 0.95}
"""Those that have a share of the squared norm to keep, ``energy=0.9``, and the one that they keep by default."""
METRICS = ("auto", "weight", "input", "fisher")


@dataclass(frozen=True)
class Options:
    """``metric``: weight, input, fisher, or auto (the best that the statistics serve). ``allow``: names of
    decompositions, () for all.

    ``exclude``: site names or shell patterns that stay dense. ``allocation``: lagrangian, or uniform (every site
    keeps the same fraction, rank rounded down to an integer); or, without a budget, energy or evbmf (the ranks that
    the singular values of each weight suggest, see :mod:`tdc.planning.suggest`).
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
        if not takes_budget(self.allocation) and self.budget is not None:
            raise BudgetError(
                f"the allocation {self.allocation} takes no budget, it suggests ranks from each weight alone: leave "
                f"out the budget, or use the allocation lagrangian or uniform"
            )
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


def read_allocation(given: object) -> tuple[str, float]:
    """Name and share: ``"energy=0.9" -> ("energy", 0.9)``; the share is 0 where there is none.

    Raises OptionError.
    """
    name, equals, text = str(given).partition("=")
    name = name.strip()
    if not isinstance(given, str) or name not in (*BUDGETED, *SUGGESTING) or (equals and name not in _SHARES):
        known = ", ".join([*BUDGETED, *(f"{n} or {n}={_SHARES[n]:g}" if n in _SHARES else n for n in SUGGESTING)])
        raise OptionError(f"unknown allocation {given!r}. Known: {known}")
    if not equals:
        return name, _SHARES.get(name, 0.0)
    try:
        share = float(text)
    except ValueError:
        raise OptionError(f"{text.strip()!r} in the allocation {given!r} is not a number") from None
    if not 0 < share <= 1:
        raise OptionError(f"the allocation {given!r} needs a share of the squared norm above 0 and at most 1")
    return name, share


def named_allocation(given: object) -> str:
    """The allocation in the words in which plans record it, its share included: ``energy -> energy=0.95``."""
    name, share = read_allocation(given)
    return f"{name}={share}" if name in _SHARES else name


def takes_budget(allocation: object) -> bool:
    """Whether it spends a budget over the sites."""
    return read_allocation(allocation)[0] in BUDGETED
