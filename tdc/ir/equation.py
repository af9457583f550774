"""Equations with named axes: the language in which operators, decompositions and kernels are written.

An equation is an einsum over axes with names: ``o r, r i -> o i``. Brackets group axes into one stored axis,
``o0 r, o1 r -> (o0 o1) r``, as in einops. Only the standard library is used here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Equation", "Term"]

Shape = tuple[int, ...]
Group = tuple[str, ...]

_TOKEN = re.compile(r"\(|\)|[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Term:
    """The axes of one operand, in storage order; each stored axis is a group of one or more named axes."""

    groups: tuple[Group, ...]

    @classmethod
    def parse(cls, text: str) -> Term:
        """Read ``"(o0 o1) i"``. Raises ValueError on anything that is not axis names and flat brackets."""
        tokens = _TOKEN.findall(text)
        if "".join(tokens) != re.sub(r"\s+", "", text):
            raise ValueError(f"cannot read the axes {text!r}: write lower-case names, and brackets for groups")
        groups: list[Group] = []
        inside: list[str] | None = None
        for token in tokens:
            if token == "(":
                if inside is not None:
                    raise ValueError(f"nested brackets in {text!r}")
                inside = []
            elif token == ")":
                if not inside:
                    raise ValueError(f"empty or unopened bracket in {text!r}")
                groups.append(tuple(inside))
                inside = None
            elif inside is None:
                groups.append((token,))
            else:
                inside.append(token)
        if inside is not None:
            raise ValueError(f"unclosed bracket in {text!r}")
        term = cls(tuple(groups))
        if len(set(term.axes)) != len(term.axes):
            raise ValueError(f"an axis is named twice in {text!r}")
        return term

    @property
    def axes(self) -> tuple[str, ...]:
        """All axis names, brackets flattened."""
        return tuple(axis for group in self.groups for axis in group)

    def shape(self, sizes: Mapping[str, int]) -> Shape:
        """The stored shape: one length per group."""
        return tuple(math.prod([sizes[axis] for axis in group]) for group in self.groups)

    def __str__(self) -> str:
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.groups)


@dataclass(frozen=True, slots=True)
class Equation:
    """``inputs -> output``: multiply the inputs and sum over the axes that the output lacks.

    Example: ``Equation.parse("b r, o r -> b o").shapes({"b": 4, "r": 2, "o": 3}) == ((4, 2), (3, 2))``.
    """

    inputs: tuple[Term, ...]
    output: Term

    @classmethod
    def parse(cls, text: str) -> Equation:
        """Read ``"o r, r i -> o i"``. Raises ValueError if an output axis comes from no input."""
        left, arrow, right = text.partition("->")
        if not arrow or not left.strip():
            raise ValueError(f"an equation is written 'a b, b c -> a c'; got {text!r}")
        equation = cls(tuple(Term.parse(part) for part in left.split(",")), Term.parse(right))
        known = {axis for term in equation.inputs for axis in term.axes}
        missing = [axis for axis in equation.output.axes if axis not in known]
        if missing:
            raise ValueError(f"output axes {missing} of {text!r} come from no input")
        return equation

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis name, in order of first appearance."""
        return tuple(dict.fromkeys(axis for term in (*self.inputs, self.output) for axis in term.axes))

    @property
    def contracted(self) -> tuple[str, ...]:
        """The axes that are summed over."""
        return tuple(axis for axis in self.axes if axis not in self.output.axes)

    def shapes(self, sizes: Mapping[str, int]) -> tuple[Shape, ...]:
        """Stored shape of every input for the given axis sizes."""
        return tuple(term.shape(sizes) for term in self.inputs)

    def macs(self, sizes: Mapping[str, int], *, without: frozenset[str] = frozenset()) -> int:
        """Multiply-adds of one direct evaluation: the product of all axis sizes, axes in ``without`` counted as 1."""
        return math.prod(sizes[axis] for axis in self.axes if axis not in without)

    def substitute(self, operand: int, rebuild: Equation) -> Equation:
        """Replace input ``operand`` by the inputs of ``rebuild``, whose output must be that operand.

        Axes of ``rebuild`` that its output lacks (its ranks) are renamed where they clash with axes of this equation.
        """
        if rebuild.output.axes != self.inputs[operand].axes:
            raise ValueError(f"'{rebuild}' does not rebuild operand '{self.inputs[operand]}' of '{self}'")
        taken = set(self.axes)
        names = {axis: axis for axis in rebuild.output.axes}
        for axis in rebuild.contracted:
            name = axis
            while name in taken:
                name += "_"
            names[axis] = name
            taken.add(name)
        renamed = tuple(Term(tuple(tuple(names[a] for a in group) for group in t.groups)) for t in rebuild.inputs)
        return Equation(self.inputs[:operand] + renamed + self.inputs[operand + 1 :], self.output)

    def subscripts(self) -> str:
        """Flat one-letter form for opt_einsum, torch.einsum and ONNX Einsum: ``"ab,cb->ac"``.

        Groups are flattened: reshape the operands to :attr:`Term.axes` first. Raises ValueError above 52 axes.
        """
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        if len(self.axes) > len(letters):
            raise ValueError(f"more than {len(letters)} axes in '{self}'")
        code = dict(zip(self.axes, letters, strict=False))
        text = ["".join(code[axis] for axis in term.axes) for term in (*self.inputs, self.output)]
        return f"{','.join(text[:-1])}->{text[-1]}"

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {self.output}"
