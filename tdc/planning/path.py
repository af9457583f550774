"""Contraction order: opt_einsum searches, with the activation in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from math import prod
from typing import Any

import opt_einsum
from opt_einsum.paths import PathOptimizer

from ..ir import Equation, Layout, OpKind, Path, Piece, Step, Window
from ..ir.equation import Term

__all__ = ["ActivationFirst", "StepCost", "StepSizes", "contraction_paths", "multiply_adds"]


_OUTER = 1e30
"""Cost of a step whose factor has no inner axis in common with the activation: an outer product, which no operator runs
well, and convolutions cannot."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """One step for one activation row or output position: ``batch`` axes that activation, factor and result share,
    ``others`` of the activation alone, ``inputs`` summed over, ``outputs`` of the factor alone, ``taps`` of each window
    axis, and the ``positions`` at which the step runs for each output position. ``conv``: whether it is a convolution.
    """

    batch: int
    others: int
    inputs: int
    outputs: int
    taps: tuple[int, ...] = ()
    positions: int = 1
    conv: bool = False
    strided: bool = False


StepCost = Callable[[StepSizes], float]


def multiply_adds(step: StepSizes) -> float:
    """The multiply-adds of a step for one row."""
    return step.batch * step.others * step.inputs * step.outputs * prod(step.taps) * step.positions


class ActivationFirst(PathOptimizer):
    """Orders in which operand 0, the activation, takes part in every contraction; the one of least cost, by default of
    fewest multiply-adds.

    A step between two factors would have only constant inputs: a constant folder downstream would run it once and put
    the dense weight back. All orders are tried; one without outer products is taken where
    there is one.

    ``strides``: the window axes of a convolution with their strides. Such an axis lies on the activation's sliding
    view; it is charged in the step whose factor carries it, by its number of taps, and in no other one. Until then the
    steps run at every entry of the input along it: stride times as many as there are positions. ``rows``: the axis that
    stands for all activation rows.
    """

    def __init__(
        self,
        strides: Mapping[str, int] | None = None,
        cost: StepCost = multiply_adds,
        rows: str = "",
        conv: bool = False,
    ) -> None:
        super().__init__()
        self.strides, self.cost, self.rows, self.conv = dict(strides or {}), cost, rows, conv

    def __call__(
        self, inputs: list[frozenset[str]], output: frozenset[str], size_dict: dict[str, int], memory_limit: Any = None
    ) -> list[tuple[int, ...]]:
        orders = list(permutations(range(1, len(inputs))))
        costs = [self._cost([inputs[k] for k in order], inputs[0], output, size_dict) for order in orders]
        return _linear(orders[costs.index(min(costs))])

    def _cost(
        self, factors: list[frozenset[str]], activation: frozenset[str], output: frozenset[str], sizes: dict[str, int]
    ) -> float:
        cost = 0.0
        for k, factor in enumerate(factors):
            later = frozenset().union(output, *factors[k + 1 :])
            if not (activation & factor) - output - set(self.strides):
                cost += _OUTER
            cost += self.cost(self._step(activation, factor, later, sizes))
            activation = (activation | factor) & later
        return cost

    def _step(
        self, activation: frozenset[str], factor: frozenset[str], later: frozenset[str], sizes: dict[str, int]
    ) -> StepSizes:
        def size(axes: frozenset[str]) -> int:
            return prod(sizes[axis] for axis in axes)

        windows = frozenset(self.strides)
        waiting, both = (activation & windows) - factor, (activation & factor) - windows
        return StepSizes(
            batch=size(both & later),
            others=size(activation - factor - windows - {self.rows}),
            inputs=size(both - later),
            outputs=size(factor - activation),
            taps=tuple(sizes[axis] if axis in factor else 1 for axis in self.strides),
            positions=prod(self.strides[axis] for axis in waiting & later),
            conv=self.conv,
            strided=any(stride > 1 and axis in factor for axis, stride in self.strides.items()),
        )


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
def contraction_paths(
    kind: OpKind, layout: Layout, windows: tuple[Window, ...] = (), cost: StepCost = multiply_adds
) -> tuple[Path, ...]:
    """One path for every piece of the layout, for one activation row or output position, of least ``cost``.

    ``windows`` (of the site) go to the steps whose factors carry them; one that no factor carries goes to the first
    step. Raises ValueError where two factors of a piece carry the same window axis.
    """
    return tuple(_piece_path(kind, layout, piece, windows, cost) for piece in layout.rebuild.pieces)


def _piece_path(kind: OpKind, layout: Layout, piece: Piece, windows: tuple[Window, ...], cost: StepCost) -> Path:
    whole = _split(kind.dense, layout).substitute(1, piece.equation)
    for window in windows:
        if sum(window.axis in term.axes for term in whole.inputs[1:]) > 1:
            raise ValueError(f"two factors of '{piece}' slide over the window axis {window.axis}")
    sizes = {axis: layout.axes.get(axis, 1) for axis in whole.axes}
    code = {axis: opt_einsum.get_symbol(n) for n, axis in enumerate(whole.axes)}
    text = ",".join("".join(code[a] for a in term.axes) for term in whole.inputs)
    text += "->" + "".join(code[a] for a in whole.output.axes)
    shapes = [tuple(sizes[a] for a in term.axes) for term in whole.inputs]
    strides = {code[window.axis]: window.stride for window in windows}
    search = ActivationFirst(strides, cost, code["b"], kind.is_conv)
    path, _ = opt_einsum.contract_path(text, *shapes, shapes=True, optimize=search)
    return _slid(_steps(whole, piece.operands, path), windows)


def _split(dense: Equation, layout: Layout) -> Equation:
    """The dense equation of an operator with the axes into which the layout splits those of the weight."""
    outputs, *inputs = layout.rebuild.output.groups
    names = {"i": inputs[0], "o": tuple(axis for axis in outputs if axis != "g")}
    terms = [
        Term(tuple((axis,) for group in term.groups for old in group for axis in names.get(old, (old,))))
        for term in (*dense.inputs, dense.output)
    ]
    return Equation(tuple(terms[:-1]), terms[-1])


def _slid(path: Path, windows: tuple[Window, ...]) -> Path:
    """The steps with their windows."""
    carriers = {
        window.axis: next((k for k, step in enumerate(path) if window.axis in step.equation.inputs[1].axes), 0)
        for window in windows
    }
    return tuple(
        replace(step, windows=tuple(w if carriers[w.axis] == k else Window(w.axis) for w in windows))
        for k, step in enumerate(path)
    )


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
