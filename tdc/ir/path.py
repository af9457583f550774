"""Paths: in which order the factors meet the activation."""

from __future__ import annotations

from dataclasses import dataclass

from .equation import Equation

__all__ = ["Path", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """The activation (operand 0) contracted with one factor (operand 1): ``b i, r i -> b r``."""

    factor: str
    equation: Equation

    def __str__(self) -> str:
        return f"{self.factor}: {self.equation}"


Path = tuple[Step, ...]
