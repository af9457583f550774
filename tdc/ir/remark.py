"""Why something was not done: every refusal is a value with its reason in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Decline", "Remark"]


@dataclass(frozen=True, slots=True)
class Decline:
    """The answer "no, because": returned where a candidate, a kernel or a fold does not apply. It is falsy."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Remark:
    """One line of the report: at which ``stage`` something was decided about ``site`` ('' for the whole model)."""

    site: str
    stage: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.site}: " if self.site else ""
        return f"[{self.stage}] {where}{self.reason}"
