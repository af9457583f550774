"""Budgets: fractions of the dense cost of the candidate sites that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from ..errors import BudgetError
from ..ir import Cost

__all__ = ["QUANTITIES", "Budget"]

QUANTITIES = ("params", "bytes", "macs")
LOSS, LEAST = "loss", "min"
LATENCY, MILLISECONDS = "latency", "latency_ms"


@dataclass(frozen=True)
class Budget:
    """``keep`` per quantity, e.g. ``(("params", 0.5), ("macs", 0.6))``: all limits hold together. Or ``loss``, how far
    the outputs may move as it is measured (see :func:`tdc.statistics.divergence`), with ``least``, the quantity of
    which as little as possible is to stay.

    ``latency``: what a run of the whole model may take, as a fraction of what the dense one does; ``latency_ms``: in
    milliseconds.
    """

    limits: tuple[tuple[str, float], ...]
    loss: float | None = None
    least: str = ""
    latency: float | None = None
    latency_ms: float | None = None

    @property
    def timed(self) -> bool:
        return self.latency is not None or self.latency_ms is not None

    def time(self, dense: float) -> float:
        """What a run may take, as a fraction of what it takes dense, ``dense`` seconds."""
        return min(
            1.0 if self.latency is None else self.latency,
            1.0 if self.latency_ms is None else self.latency_ms / 1e3 / dense,
        )

    def with_limit(self, key: str, keep: float) -> Budget:
        """And one more limit, as a fraction of the dense cost."""
        return replace(self, limits=(*self.limits, (key, keep)))

    @classmethod
    def parse(cls, given: object) -> Budget:
        """Read ``"params=0.5"``, ``"params=0.5,macs=0.6"`` or ``{"params": 0.5}``; ``"loss=0.01"`` or
        ``"loss=0.01,macs=min"``.

        Raises BudgetError; for a bare number with the words to write instead, since "0.5" alone could mean what stays
        or what goes, of the parameters or of the time.
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            raise BudgetError(
                f"budget={given} does not say of what: write budget='params={given}' to keep that fraction of the "
                f"candidate sites' parameters (or bytes=, macs=, joined by commas)"
            )
        if isinstance(given, Mapping):
            pairs = [(str(key), value) for key, value in given.items()]
        elif isinstance(given, str):
            pairs = [_pair(part) for part in given.split(",")]
        else:
            raise BudgetError(f"budget must be a text such as 'params=0.5' or a mapping; got {type(given).__name__}")
        if not pairs:
            raise BudgetError("the budget is empty: write for example 'params=0.5'")
        if len({key for key, _ in pairs}) != len(pairs):
            raise BudgetError(f"the budget {given!r} names a quantity twice")
        if any(key == LOSS or value == LEAST for key, value in pairs):
            return cls._searched(given, dict(pairs))
        times = {key: value for key, value in pairs if key in (LATENCY, MILLISECONDS)}
        limits = tuple((_quantity(key), _fraction(key, value)) for key, value in pairs if key not in times)
        latency = _fraction(LATENCY, times[LATENCY]) if LATENCY in times else None
        return cls(limits, None, "", latency, _positive(MILLISECONDS, times.get(MILLISECONDS)))

    @classmethod
    def _searched(cls, given: object, pairs: dict[str, object]) -> Budget:
        loss = pairs.pop(LOSS, None)
        least = [_quantity(key) for key, value in pairs.items() if value == LEAST]
        if len(least) != len(pairs) or len(least) > 1:
            raise BudgetError(
                f"the budget {given!r} limits what stays and the loss: write 'loss=0.01' to keep as few parameters as "
                f"that allows, 'loss=0.01,macs={LEAST}' for another quantity, or limits alone, 'params=0.5,macs=0.6'"
            )
        return cls((), _positive(LOSS, loss), (least or ["params"])[0])

    def allowance(self, dense: Cost) -> dict[str, float]:
        """The limits in absolute numbers, from the decimals as written: 0.285 of 200 is 57, and not
        56.99999999999999.
        """
        return {key: float(Fraction(str(keep)) * Fraction(getattr(dense, key))) for key, keep in self.limits}

    def __str__(self) -> str:
        if self.least:
            loss = [] if self.loss is None else [f"{LOSS}={self.loss:g}"]
            return ",".join([*loss, *([] if loss and self.least == "params" else [f"{self.least}={LEAST}"])])
        times = [(LATENCY, self.latency), (MILLISECONDS, self.latency_ms)]
        return ",".join(f"{key}={keep:g}" for key, keep in (*self.limits, *times) if keep is not None)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BudgetError(f"cannot read {text.strip()!r} in the budget: write for example 'params=0.5,macs=0.6'")
    return key.strip(), value.strip()


def _quantity(key: str) -> str:
    if key not in QUANTITIES:
        import difflib

        known = (*QUANTITIES, LATENCY, MILLISECONDS, LOSS)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BudgetError(f"unknown quantity {key!r} in the budget{hint} Known: {', '.join(known)}")
    return key


def _positive(key: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BudgetError(f"{key}={value!r} in the budget is not a number") from None
    if not 0 < number < float("inf"):
        raise BudgetError(f"{key}={value} in the budget must be above 0")
    return number


def _fraction(key: str, value: object) -> float:
    try:
        keep = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BudgetError(f"{key}={value!r} in the budget is not a number") from None
    if not 0 < keep <= 1:
        raise BudgetError(f"{key}={value} in the budget must be above 0 and at most 1: it is the fraction that stays")
    return keep
