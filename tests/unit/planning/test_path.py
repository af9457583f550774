from __future__ import annotations

import itertools

import numpy as np
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc.ir import Layout, OpKind, Rebuild
from tdc.ir.path import Path
from tdc.planning.path import ActivationFirst, contraction_paths

SIZE = st.integers(1, 30)
CHAIN = "o i = u[o s] c[s r] v[r i]"


def macs(path: Path, sizes: dict[str, int]) -> int:
    return sum(int(np.prod([sizes.get(axis, 1) for axis in step.equation.axes])) for step in path)


def cheapest(o: int, s: int, r: int, i: int) -> int:
    """All six orders of ``x`` with u (o, s), c (s, r), v (r, i), each step written out by hand."""
    factors = {"u": {"o": o, "s": s}, "c": {"s": s, "r": r}, "v": {"r": r, "i": i}}
    costs = []
    for order in itertools.permutations(factors):
        have, total, left = {"i": i}, 0, dict(factors)
        for name in order:
            joined = {**have, **left.pop(name)}
            total += int(np.prod(list(joined.values())))
            needed = {"o"} | {axis for factor in left.values() for axis in factor}
            have = {axis: size for axis, size in joined.items() if axis in needed}
        costs.append(total)
    return min(costs)


@settings(max_examples=60)
@given(o=SIZE, s=SIZE, r=SIZE, i=SIZE)
def test_the_cheapest_order_of_a_chain_is_found(o: int, s: int, r: int, i: int) -> None:
    sizes = {"o": o, "i": i, "r": r, "s": s}
    (path,) = contraction_paths(OpKind.LINEAR, Layout(Rebuild.parse(CHAIN), tuple(sizes.items())))
    assert macs(path, sizes) == cheapest(o, s, r, i)
    assert sorted(step.factor for step in path) == ["c", "u", "v"]


@settings(max_examples=40)
@given(o=SIZE, s=SIZE, r=SIZE, i=SIZE)
def test_the_activation_takes_part_in_every_step(o: int, s: int, r: int, i: int) -> None:
    sizes = (("o", o), ("i", i), ("r", r), ("s", s))
    (path,) = contraction_paths(OpKind.LINEAR, Layout(Rebuild.parse(CHAIN), sizes))
    assert all("b" in step.equation.inputs[0].axes and "b" in step.equation.output.axes for step in path)
    assert path[-1].equation.output.axes == ("b", "o")
    for step, after in itertools.pairwise(path):
        assert step.equation.output == after.equation.inputs[0]


def test_opt_einsum_would_join_the_factors_first_and_this_order_does_not() -> None:
    """With a thousand rows and tiny factors the free search multiplies two factors with each other."""
    shapes = [(1000, 3), (2, 3), (2, 2), (3, 2)]
    text = "bi,ri,sr,os->bo"
    free, _ = opt_einsum.contract_path(text, *shapes, shapes=True, optimize="optimal")
    held, _ = opt_einsum.contract_path(text, *shapes, shapes=True, optimize=ActivationFirst())
    assert 0 not in free[0]
    assert 0 in held[0]
    positions = 4
    for pair in held[1:]:
        positions -= 1
        assert positions - 1 in pair, "the last operand is the result of the step before, which holds the activation"


def test_a_path_computes_the_einsum() -> None:
    arrays = [np.random.default_rng(k).normal(size=shape) for k, shape in enumerate([(5, 3), (2, 3), (4, 2), (6, 4)])]
    held = opt_einsum.contract("bi,ri,sr,os->bo", *arrays, optimize=ActivationFirst())
    np.testing.assert_allclose(held, np.einsum("bi,ri,sr,os->bo", *arrays), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("o i = u[o r] v[r i]", [["v: b i, r i -> b r", "u: b r, o r -> b o"]]),
        (
            "o i = rows[p i] | coef[q p] rows[p i] over o = p q at place",
            [["rows: b i, p i -> b p"], ["rows: b i, p i -> b p", "coef: b p, q p -> b q"]],
        ),
    ],
)
def test_every_piece_has_its_path(text: str, steps: list[list[str]]) -> None:
    layout = Layout(Rebuild.parse(text), (("o", 12), ("i", 8), ("r", 3), ("p", 3), ("q", 9)))
    assert [[str(step) for step in path] for path in contraction_paths(OpKind.LINEAR, layout)] == steps
