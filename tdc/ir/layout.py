"""Layouts: how factors rebuild a dense weight, as named-axes equations plus the sizes of their axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .equation import Equation, Shape, Term

__all__ = ["INDEX_BYTES", "Layout", "Piece", "Rebuild"]

INDEX_BYTES = 4
"""Bytes of one entry of an index factor (int32)."""

_FACTOR = re.compile(r"([a-z][a-z0-9_]*)\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Piece:
    """One product of factors: ``coef[q p] rows[p i]``, giving the terms of one part of the weight."""

    operands: tuple[str, ...]
    equation: Equation

    def __str__(self) -> str:
        return " ".join(f"{name}[{term}]" for name, term in zip(self.operands, self.equation.inputs, strict=True))


@dataclass(frozen=True)
class Rebuild:
    """``o i = piece``, a sum ``o i = piece + piece``, or pieces side by side along one axis of the weight.

    ``o i = rows[p i] | coef[q p] rows[p i] over o = p q at place`` says: stack the two pieces along ``o`` (their own
    parts of it are ``p`` and ``q``); row ``j`` of the weight is row ``place[j]`` of the stack. With ``by order``
    instead, row ``k`` of the stack is row ``order[k]`` of the weight. Both are index factors (int32, length of
    ``o``); 'at' suits an output axis and 'by' an input axis, where each is one gather of the activation.
    """

    output: Term
    pieces: tuple[Piece, ...]
    join: str = ""
    parts: tuple[str, ...] = ()
    index: str = ""
    at: bool = False

    @classmethod
    def parse(cls, text: str) -> Rebuild:
        """Read the text form above. Raises ValueError where it is not well-formed."""
        left, _, right = text.partition("=")
        body, _, tail = right.partition(" over ")
        join, parts, index, at = "", (), "", False
        if tail:
            match = re.fullmatch(r"\s*(\w+)\s*=\s*([\w ]+?)\s+(at|by)\s+(\w+)\s*", tail)
            if match is None:
                raise ValueError(f"write 'over o = p q at place'; got 'over {tail}'")
            join, parts, at, index = match[1], tuple(match[2].split()), match[3] == "at", match[4]
        texts = body.split("|") if join else body.split("+")
        if join and len(texts) != len(parts):
            raise ValueError(f"{len(texts)} pieces but {len(parts)} parts in {text!r}")
        output = Term.parse(left)
        pieces = []
        for k, piece in enumerate(texts):
            found = _FACTOR.findall(piece)
            if not found or _FACTOR.sub("", piece).strip():
                raise ValueError(f"cannot read the factors {piece.strip()!r}: write 'name[axes] name[axes]'")
            out = str(output) if not join else " ".join(parts[k] if a == join else a for a in output.axes)
            equation = Equation.parse(f"{', '.join(term for _, term in found)} -> {out}")
            pieces.append(Piece(tuple(name for name, _ in found), equation))
        return cls(output, tuple(pieces), join, parts, index, at)

    @cached_property
    def factors(self) -> Mapping[str, Term]:
        """Name and axes of every real-valued factor, in order of first appearance."""
        terms: dict[str, Term] = {}
        for piece in self.pieces:
            for name, term in zip(piece.operands, piece.equation.inputs, strict=True):
                if terms.setdefault(name, term) != term:
                    raise ValueError(f"factor {name!r} has two different terms in '{self}'")
        return terms

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all factors; the index factor, if there is one, comes last."""
        return (*self.factors, self.index) if self.index else tuple(self.factors)

    def __str__(self) -> str:
        body = (" | " if self.join else " + ").join(map(str, self.pieces))
        tail = (
            f" over {self.join} = {' '.join(self.parts)} {'at' if self.at else 'by'} {self.index}" if self.join else ""
        )
        return f"{self.output} = {body}{tail}"


@dataclass(frozen=True)
class Layout:
    """A rebuild equation with the sizes of all its axes: from it follow factor shapes, counts and cost."""

    rebuild: Rebuild
    sizes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        axes = self.axes
        needed = {axis for term in (*self.rebuild.factors.values(), self.rebuild.output) for axis in term.axes}
        missing = needed - set(axes)
        if missing:
            raise ValueError(f"no size given for {sorted(missing)} in '{self.rebuild}'")
        if any(size < 0 for size in axes.values()):
            raise ValueError(f"negative size in {axes}")
        if self.rebuild.join and axes[self.rebuild.join] != sum(axes[part] for part in self.rebuild.parts):
            raise ValueError(f"parts of {self.rebuild.join} do not add up in {axes}")

    @property
    def axes(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every factor by name, the index factor included."""
        axes = self.axes
        shapes = {name: term.shape(axes) for name, term in self.rebuild.factors.items()}
        if self.rebuild.index:
            shapes[self.rebuild.index] = (axes[self.rebuild.join],)
        return shapes

    @property
    def params(self) -> int:
        """Real numbers stored, the index factor not counted."""
        axes = self.axes
        return sum(math.prod(term.shape(axes)) for term in self.rebuild.factors.values())

    def __str__(self) -> str:
        return f"{self.rebuild} with {' '.join(f'{axis}={size}' for axis, size in self.sizes)}"
