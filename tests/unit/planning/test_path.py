from __future__ import annotations

import itertools

import numpy as np
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc import targets
from tdc.ir import Block, Layout, OpKind, Rebuild, Window
from tdc.ir.path import Path
from tdc.passes._clock import StepSeconds
from tdc.planning.path import ActivationFirst, StepSizes, contraction_paths, multiply_adds
from tdc.planning.seconds import Clock
from tdc.planning.works import Call

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
            "o i = pivot(coef, place)[o r] rows[r i] + base[o i]",
            [["rows: b i, r i -> b r", "coef: b r, o r -> b o"], ["base: b i, o i -> b o"]],
        ),
    ],
)
def test_every_piece_has_its_path(text: str, steps: list[list[str]]) -> None:
    layout = Layout(Rebuild.parse(text), (("o", 12), ("i", 8), ("r", 3)))
    assert [[str(step) for step in path] for path in contraction_paths(OpKind.LINEAR, layout)] == steps


TUCKER = "(g o) i p q = u[(g o) s] core[(g s) r p q] v[(g r) i]"
IMAGE = (("g", 1), ("o", 256), ("i", 256), ("p", 3), ("q", 3), ("s", 64), ("r", 64))
POSITIONS = 8 * 56 * 56


def image_block(text: str, sizes: tuple[tuple[str, int], ...], stride: int = 1) -> Block:
    layout = Layout(Rebuild.parse(text), sizes)
    windows = tuple(Window(axis, dict(sizes)[axis], stride, 1, 1, 1) for axis in ("p", "q"))
    block = targets.get("cpu").lower(OpKind.CONV2D, layout, contraction_paths(OpKind.CONV2D, layout, windows))
    assert isinstance(block, Block)
    return block


def test_a_window_is_charged_in_the_step_that_carries_it_and_nowhere_else() -> None:
    """Two operations a multiply-add: 3.49e9 for 1 x 1, core, 1 x 1. With the window on the activation in every step
    opt_einsum finds nothing below 8.24e9, and takes the factors together first.
    """
    block = image_block(TUCKER, IMAGE)
    assert [op.inputs[1] for op in block.ops] == ["v", "core", "u"]
    assert 2 * POSITIONS * block.macs == 2 * POSITIONS * (256 * 64 + 64 * 64 * 9 + 64 * 256) == 3_493_855_232
    shapes = [(POSITIONS, 256, 3, 3), (64, 256), (64, 64, 3, 3), (256, 64)]
    naive, info = opt_einsum.contract_path("bipq,ri,srpq,os->bo", *shapes, shapes=True, optimize="optimal")
    assert float(info.opt_cost) == pytest.approx(8.24e9, rel=1e-3)
    assert naive[0] == (1, 2)


def test_steps_before_a_stride_are_charged_for_every_entry_that_they_run_at() -> None:
    """With stride 4 the first 1 x 1 runs at 16 entries for each position: the order stays, the cost does not."""
    block = image_block(TUCKER, IMAGE, stride=4)
    assert [op.inputs[1] for op in block.ops] == ["v", "core", "u"]
    assert block.macs_at({"p": 4.0, "q": 4.0}) == 16 * 256 * 64 + 64 * 64 * 9 + 64 * 256


@settings(max_examples=60)
@given(o=SIZE, s=SIZE, r=SIZE, i=SIZE, taps=st.integers(1, 5), stride=st.integers(1, 4))
def test_every_step_of_a_convolution_sums_over_the_inputs_of_its_factor(
    o: int, s: int, r: int, i: int, taps: int, stride: int
) -> None:
    """A step that kept the inputs of its factor as an axis of its own is no convolution, however cheap."""
    sizes = (("g", 1), ("o", o), ("i", i), ("p", taps), ("q", 1), ("s", s), ("r", r))
    for op in image_block(TUCKER, sizes, stride).ops:
        assert op.equation is not None
        assert op.equation.inputs[1].groups[1][0] in op.equation.contracted, str(op)


def test_a_window_that_no_factor_carries_slides_in_the_first_step() -> None:
    layout = Layout(
        Rebuild.parse("(g o) i p = u[(g o) r] v[(g r) i p]"), (("g", 1), ("o", 6), ("i", 4), ("p", 3), ("r", 2))
    )
    (path,) = contraction_paths(OpKind.CONV1D, layout, (Window("p", 3, 2, 1, 1, 1),))
    assert [str(step.windows[0]) for step in path] == ["p=3 stride 2 pad 1", "p=1"]


def test_two_factors_on_one_window_axis_are_refused() -> None:
    layout = Layout(
        Rebuild.parse("(g o) i p = u[(g o) r p] v[(g r) i p]"), (("g", 1), ("o", 6), ("i", 4), ("p", 3), ("r", 2))
    )
    with pytest.raises(ValueError, match=r"two factors .* slide over the window axis p"):
        contraction_paths(OpKind.CONV1D, layout, (Window("p", 3),))


@pytest.mark.parametrize("name", ["generic-cpu", "nvidia-h200"])
@pytest.mark.parametrize("rows", [1.0, 300.0])
def test_by_time_no_other_order_is_predicted_to_be_faster(name: str, rows: float) -> None:
    """Two Kronecker factors, the steps of both orders written out by hand."""
    machine = targets.get(name).machine
    assert machine is not None
    cost = StepSeconds(Clock(machine), Call(rows))
    for o1, o2, i1, i2 in itertools.product((2, 64), (3, 50), (5, 70), (4, 33)):
        sizes = (("o", o1 * o2), ("i", i1 * i2), ("o1", o1), ("o2", o2), ("i1", i1), ("i2", i2))
        layout = Layout(Rebuild.parse("(o1 o2) (i1 i2) = a[o1 i1] c[o2 i2]"), sizes)
        (path,) = contraction_paths(OpKind.LINEAR, layout, cost=cost)
        first = cost(StepSizes(1, i2, i1, o1)) + cost(StepSizes(1, o1, i2, o2))
        second = cost(StepSizes(1, i1, i2, o2)) + cost(StepSizes(1, o2, i1, o1))
        assert [step.factor for step in path] == (["a", "c"] if first <= second else ["c", "a"])


def test_the_order_is_the_one_of_least_cost_whatever_the_cost() -> None:
    """Kronecker factors commute: by multiply-adds the first one goes first, and by the opposite cost the other one."""
    kind, sizes = OpKind.LINEAR, (("o", 12), ("i", 40), ("o1", 2), ("o2", 6), ("i1", 20), ("i2", 2))
    layout = Layout(Rebuild.parse("(o1 o2) (i1 i2) = a[o1 i1] c[o2 i2]"), sizes)
    orders = {}
    for name, cost in (("least", multiply_adds), ("most", lambda step: -multiply_adds(step))):
        (path,) = contraction_paths(kind, layout, cost=cost)
        orders[name] = [step.factor for step in path]
    assert orders == {"least": ["a", "c"], "most": ["c", "a"]}
