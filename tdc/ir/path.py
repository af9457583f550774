"""Paths: in which order the factors meet the activation."""

from __future__ import annotations

from dataclasses import dataclass

from .equation import Equation
from .window import Window

__all__ = ["Path", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """The activation (operand 0) contracted with one factor (operand 1): ``b i, r i -> b r``.

    ``windows``: how the window axes slide in this step, for convolutions; an axis that another step takes has one tap
    here and no stride.
    """

    factor: str
    equation: Equation
    windows: tuple[Window, ...] = ()

    def __str__(self) -> str:
        return f"{self.factor}: {self.equation}"


Path = tuple[Step, ...]
