"""Layouts: how factors rebuild a dense weight, as named-axes equations plus the sizes of their axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .equation import Equation, Shape, Term

__all__ = ["INDEX_BYTES", "Layout", "Piece", "Pivot", "Rebuild"]

INDEX_BYTES = 4
"""Bytes of one entry of an index factor (int32)."""

_FACTOR = re.compile(r"(?:pivot\(\s*(\w+)\s*,\s*(\w+)\s*\)|([a-z][a-z0-9_]*))\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Pivot:
    """A factor of which an identity block is not stored: ``pivot(coef, place)[o r]``.

    Axis ``split`` (o) of the factor holds the ``rank`` (r) rows of an identity beside the stored coefficients of the
    others, ``coef`` (o - r, r). ``leading`` (rank axis last, as here): row ``j`` of the factor is row ``place[j]`` of
    the stack, which at run time is one gather of the output. Else, ``pivot(coef, order)[r i]``: column ``k`` of the
    stack is column ``order[k]`` of the factor, one gather of the input. The index is int32, one entry per entry of the
    split axis, groups counted (stacks of all groups side by side: identities first).
    """

    coef: str
    index: str
    split: str
    rank: str
    leading: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """One product of factors, ``u[o r] v[r i]``; names, and their terms in the equation."""

    operands: tuple[str, ...]
    equation: Equation
    pivots: tuple[Pivot | None, ...]

    def __str__(self) -> str:
        parts = []
        for name, term, pivot in zip(self.operands, self.equation.inputs, self.pivots, strict=True):
            parts.append(f"pivot({name}, {pivot.index})[{term}]" if pivot else f"{name}[{term}]")
        return " ".join(parts)


@dataclass(frozen=True)
class Rebuild:
    """``o i = piece``, or a sum ``o i = piece + piece``, of products of factors; see :class:`Pivot` for factors that
    are stored without their identity block.
    """

    output: Term
    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str) -> Rebuild:
        """Read ``"o i = pivot(coef, place)[o r] rows[r i]"``. Raises ValueError where it is not well-formed."""
        left, _, right = text.partition("=")
        output = Term.parse(left)
        pieces = []
        for piece in right.split("+"):
            found = _FACTOR.findall(piece)
            if not found or _FACTOR.sub("", piece).strip():
                raise ValueError(f"cannot read the factors {piece.strip()!r}: write 'name[axes] name[axes]'")
            equation = Equation.parse(f"{', '.join(term for *_, term in found)} -> {output}")
            pivots = tuple(
                _pivot(coef, index, term, output) if coef else None
                for (coef, index, *_), term in zip(found, equation.inputs, strict=True)
            )
            pieces.append(Piece(tuple(coef or name for coef, _, name, _ in found), equation, pivots))
        return cls(output, tuple(pieces))

    @cached_property
    def factors(self) -> Mapping[str, Term]:
        """Name and axes of every real-valued factor, in order of first appearance."""
        terms: dict[str, Term] = {}
        for piece in self.pieces:
            for name, term in zip(piece.operands, piece.equation.inputs, strict=True):
                if terms.setdefault(name, term) != term:
                    raise ValueError(f"factor {name!r} has two different terms in '{self}'")
        return terms

    @cached_property
    def pivots(self) -> Mapping[str, Pivot]:
        """The factors that are stored without their identity block, by name."""
        return {pivot.coef: pivot for piece in self.pieces for pivot in piece.pivots if pivot is not None}

    @property
    def indices(self) -> tuple[str, ...]:
        """Names of the index factors."""
        return tuple(pivot.index for pivot in self.pivots.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all factors; index factors come last."""
        return (*self.factors, *self.indices)

    def __str__(self) -> str:
        return f"{self.output} = {' + '.join(map(str, self.pieces))}"


def _pivot(coef: str, index: str, term: Term, output: Term) -> Pivot:
    axes = [group[-1] for group in term.groups]
    inner = [axis for axis in axes if axis not in output.axes]
    if len(term.groups) != 2 or len(inner) != 1:
        raise ValueError(f"a pivoted factor has one axis of the weight and one rank; got {term}")
    rank = inner[0]
    split = next(axis for axis in axes if axis != rank)
    return Pivot(coef, index, split, rank, leading=axes[1] == rank)


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
        for pivot in self.rebuild.pivots.values():
            if axes[pivot.split] < axes[pivot.rank]:
                raise ValueError(f"{pivot.rank} is larger than {pivot.split}, of which it is a part, in {axes}")

    @property
    def axes(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every factor by name, index factors included."""
        axes = self.axes
        shapes = {}
        for name, term in self.rebuild.factors.items():
            pivot = self.rebuild.pivots.get(name)
            shapes[name] = term.shape({**axes, pivot.split: axes[pivot.split] - axes[pivot.rank]} if pivot else axes)
        for name, pivot in self.rebuild.pivots.items():
            whole = next(g for g in self.rebuild.factors[name].groups if pivot.split in g or pivot.rank in g)
            shapes[pivot.index] = (axes[pivot.split] * math.prod(axes[a] for a in whole[:-1]),)
        return shapes

    def with_size(self, axis: str, size: int) -> Layout:
        """The same equation with another size of one axis."""
        return Layout(self.rebuild, tuple((name, size if name == axis else old) for name, old in self.sizes))

    @property
    def params(self) -> int:
        """Real numbers stored, index factors not counted."""
        shapes = self.shapes
        return sum(math.prod(shapes[name]) for name in self.rebuild.factors)

    def __str__(self) -> str:
        return f"{self.rebuild} with {' '.join(f'{axis}={size}' for axis, size in self.sizes)}"
