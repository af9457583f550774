"""Sites: the places of a model where a weight acts linearly and may be replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

from .equation import Equation

__all__ = ["OpKind", "Site", "assign", "same_weight"]

SKETCH_TOLERANCE = 0.02
"""Greatest difference between two sketches of one weight: rounding to bfloat16 moves an entry by below 0.005."""


class OpKind(Enum):
    """What an operator computes, as an equation of activation (operand 0) and weight (operand 1)."""

    LINEAR = "linear"

    @property
    def dense(self) -> Equation:
        """The dense equation, e.g. ``b i, o i -> b o``; ``b`` stands for all leading axes of the activation."""
        return _DENSE[self]


_DENSE = {OpKind.LINEAR: Equation.parse("b i, o i -> b o")}


@dataclass(frozen=True)
class Site:
    """One dense weight in canonical axes, with all its uses.

    ``sizes`` are the axis sizes of the canonical weight, for ``linear`` ``o`` (outputs) and ``i`` (inputs), whatever
    the storage order of the frontend. ``order`` is the topological place of the first use. ``sketch`` are a few
    numbers that a transposition and a rescaling of rows leave alone; () where the weight is not finite. ``names`` are
    aliases, the first one is shown; they identify nothing. ``uses`` counts the operators that read the weight (tied:
    > 1). ``pointwise_consumer`` is the order of the one site that reads this site's output through elementwise
    functions only, or None.
    """

    kind: OpKind
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    order: int = field(compare=False)
    sketch: tuple[float, ...]
    names: tuple[str, ...] = field(compare=False)
    uses: int = 1
    attributes: tuple[tuple[str, str], ...] = ()
    pointwise_consumer: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis sizes as a mapping: ``{"o": 384, "i": 1536}``."""
        return MappingProxyType(dict(self.sizes))

    @property
    def params(self) -> int:
        """Numbers in the dense weight."""
        return math.prod(self.kind.dense.inputs[1].shape(self.axes))

    @property
    def tied(self) -> bool:
        return self.uses > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them."""
        return {
            "names": list(self.names),
            "kind": self.kind.value,
            "sizes": dict(self.sizes),
            "attributes": dict(self.attributes),
            "dtype": self.dtype,
            "order": self.order,
            "uses": self.uses,
            "sketch": list(self.sketch),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Site:
        """Raises KeyError, TypeError or ValueError where ``row`` is not what :meth:`to_dict` gives."""
        names = tuple(str(name) for name in row["names"])
        if not names:
            raise ValueError("a site needs a name")
        return cls(
            kind=OpKind(row["kind"]),
            sizes=tuple((str(axis), int(size)) for axis, size in row["sizes"].items()),
            dtype=str(row["dtype"]),
            order=int(row["order"]),
            sketch=tuple(float(x) for x in row["sketch"]),
            names=names,
            uses=int(row.get("uses", 1)),
            attributes=tuple((str(k), str(v)) for k, v in row.get("attributes", {}).items()),
        )

    @property
    def label(self) -> str:
        """``linear 384x1536``, for tables and messages."""
        return f"{self.kind.value} {'x'.join(str(size) for _, size in self.sizes)}"


def same_weight(a: Site, b: Site) -> bool:
    """True if both describe the same kind of operator on the same weight (shape, attributes and sketch agree)."""
    if (a.kind, a.sizes, a.attributes, len(a.sketch)) != (b.kind, b.sizes, b.attributes, len(b.sketch)):
        return False
    return all(abs(p - q) <= SKETCH_TOLERANCE for p, q in zip(a.sketch, b.sketch, strict=True))


def assign(wanted: Sequence[Site], found: Sequence[Site]) -> list[Site | None]:
    """For each wanted site the one of ``found`` that holds the same weight, or None.

    Several sites with one sketch (equal weights) are paired by name, else in topological order; where a door merged
    equal weights into fewer sites, the last one serves the rest.
    """
    answer: list[Site | None] = []
    taken: dict[int, int] = {}
    for site in wanted:
        fitting = sorted((f for f in found if same_weight(site, f)), key=lambda f: f.order)
        if not fitting or not site.sketch:
            answer.append(None)
            continue
        named = next((f for f in fitting if set(f.names) & set(site.names)), None)
        if named is not None:
            answer.append(named)
            continue
        first = fitting[0].order
        place = min(taken.get(first, 0), len(fitting) - 1)
        taken[first] = place + 1
        answer.append(fitting[place])
    return answer
