"""Contraction order: opt_einsum searches, with the activation in every step."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import Any

import opt_einsum
from opt_einsum.paths import PathOptimizer

from ..ir import Equation, Layout, OpKind, Path, Step
from ..ir.equation import Term

__all__ = ["ActivationFirst", "contraction_paths"]


class ActivationFirst(PathOptimizer):
    """Orders in which operand 0, the activation, takes part in every contraction; the one of fewest multiply-adds.

    A step between two factors would have only constant inputs: a constant folder downstream would run it once and put
    the dense weight back. Among at most four factors all orders are tried.
    """

    def __call__(
        self, inputs: list[frozenset[str]], output: frozenset[str], size_dict: dict[str, int], memory_limit: Any = None
    ) -> list[tuple[int, ...]]:
        best: tuple[float, tuple[int, ...]] | None = None
        for order in permutations(range(1, len(inputs))):
            cost, activation, left = 0.0, inputs[0], list(order)
            while left:
                factor = inputs[left.pop(0)]
                step = 1.0
                for axis in activation | factor:
                    step *= size_dict[axis]
                cost += step
                later = frozenset().union(output, *(inputs[k] for k in left))
                activation = (activation | factor) & later
            if best is None or cost < best[0]:
                best = (cost, order)
        assert best is not None
        return _linear(best[1])


def _linear(order: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Positions as opt_einsum counts them: operands that were contracted leave, and the result comes last."""
    present = list(range(len(order) + 1))
    activation, path = 0, []
    for factor in order:
        pair = sorted((present.index(activation), present.index(factor)))
        path.append(tuple(pair))
        present = [name for name in present if name not in (activation, factor)]
        activation = -1
        present.append(activation)
    return path


@lru_cache(maxsize=4096)
def contraction_paths(kind: OpKind, layout: Layout) -> tuple[Path, ...]:
    """One path for every piece of the layout, for one activation row."""
    return tuple(_piece_path(kind.dense, layout, k) for k in range(len(layout.rebuild.pieces)))


def _piece_path(dense: Equation, layout: Layout, k: int) -> Path:
    rebuild, piece = layout.rebuild, layout.rebuild.pieces[k]
    if rebuild.join:
        dense = Equation.parse(_rename(str(dense), rebuild.join, rebuild.parts[k]))
    whole = dense.substitute(1, piece.equation)
    sizes = {axis: layout.axes.get(axis, 1) for axis in whole.axes}
    code = {axis: opt_einsum.get_symbol(n) for n, axis in enumerate(whole.axes)}
    text = ",".join("".join(code[a] for a in term.axes) for term in whole.inputs)
    text += "->" + "".join(code[a] for a in whole.output.axes)
    shapes = [tuple(sizes[a] for a in term.axes) for term in whole.inputs]
    path, _ = opt_einsum.contract_path(text, *shapes, shapes=True, optimize=ActivationFirst())
    return _steps(whole, piece.operands, path)


def _steps(whole: Equation, names: tuple[str, ...], path: list[tuple[int, ...]]) -> Path:
    operands: list[tuple[str, Term]] = [("", whole.inputs[0]), *zip(names, whole.inputs[1:], strict=True)]
    steps = []
    for contraction in path:
        chosen = [operands[k] for k in sorted(contraction)]
        operands = [operand for k, operand in enumerate(operands) if k not in contraction]
        activation = next(term for name, term in chosen if not name)
        factor, factor_term = next((name, term) for name, term in chosen if name)
        later = {a for _, term in operands for a in term.axes} | set(whole.output.axes)
        if not operands:
            result = whole.output
        else:
            kept = dict.fromkeys(a for a in (*activation.axes, *factor_term.axes) if a in later)
            result = Term(tuple((axis,) for axis in kept))
        steps.append(Step(factor, Equation((activation, factor_term), result)))
        operands.append(("", result))
    return tuple(steps)


def _rename(text: str, old: str, new: str) -> str:
    import re

    return re.sub(rf"\b{old}\b", new, text)
