from __future__ import annotations

from collections.abc import Callable

import pytest

from tdc import decompositions, targets
from tdc.errors import VerificationError
from tdc.ir import Block, Equation, Op, OpKind, Window, conv_shape
from tdc.ir.verify import verify_block
from tdc.planning.path import contraction_paths
from tdc.testing import applicable, variants_of

SIZES = (("o", 12), ("i", 8), ("r", 3))
FACTORS = (("v", (3, 8)), ("u", (12, 3)))
INNER, OUTER = Equation.parse("b i, r i -> b r"), Equation.parse("b r, o r -> b o")
FIRST, SECOND = Op("matmul", "t0", ("x", "v"), INNER), Op("matmul", "t1", ("t0", "u"), OUTER)


AXES = {"o": 12, "i": 8}
IMAGE = {"g": 2, "o": 6, "i": 5, "p": 3, "q": 3}
WINDOWS = (Window("p", 3, 2, 1, 1, 1), Window("q", 3, 1, 2, 0, 3))
WIDE = Op("conv", "t0", ("x", "w"), Equation.parse("b g i p q, (g o) i p q -> b g o"), windows=WINDOWS)
CONV = OpKind.CONV2D


@pytest.mark.parametrize("name", applicable(AXES, by_default=True))
def test_blocks_print_as_straight_lines(golden: Callable[[str], None], name: str) -> None:
    d, texts = decompositions.get(name), []
    for variant in variants_of(name, AXES):
        for rank in (3, 8):
            layout = d.layout(AXES, dict.fromkeys(d.full_ranks(AXES, variant), rank), variant)
            block = targets.get("cpu").lower(OpKind.LINEAR, layout, contraction_paths(OpKind.LINEAR, layout))
            texts.append(f"{variant or name}, rank {rank}: {block.macs} multiply-adds\n{block}")
    golden("\n".join(texts))


def test_multiply_adds_leave_the_batch_out() -> None:
    assert Block(FACTORS, (FIRST, SECOND), "t1", SIZES).macs == 3 * 8 + 12 * 3


def test_a_good_block_passes() -> None:
    verify_block(Block(FACTORS, (FIRST, SECOND), "t1", SIZES))


@pytest.mark.parametrize(
    ("factors", "ops", "output", "message"),
    [
        ((("x", (3, 8)),), (FIRST,), "t0", "has the name of the input"),
        (FACTORS, (Op("fold", "t0", ("x", "v")), SECOND), "t1", "unknown primitive 'fold'"),
        (FACTORS, (SECOND, FIRST), "t1", r"uses \['t0'\] before it is defined"),
        (FACTORS, (Op("matmul", "w", ("u", "v"), OUTER), FIRST, SECOND), "t1", "has only constant inputs"),
        (FACTORS, (FIRST, SECOND, FIRST), "t1", "assigns 't0' a second time"),
        (FACTORS, (Op("matmul", "t0", ("x", "v")), SECOND), "t1", "and only they, have an equation"),
        (FACTORS, (FIRST, SECOND), "t2", "'t2' is never computed"),
        (FACTORS, (FIRST,), "t0", r"factors \['u'\] are never used"),
    ],
)
def test_a_broken_block_is_refused_with_what_is_broken(
    factors: tuple[tuple[str, tuple[int, ...]], ...], ops: tuple[Op, ...], output: str, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_block(Block(factors, ops, output, SIZES))


@pytest.mark.parametrize("name", applicable(IMAGE, by_default=True))
def test_blocks_of_convolutions_print_as_straight_lines(golden: Callable[[str], None], name: str) -> None:
    d, texts = decompositions.get(name), []
    for variant in variants_of(name, IMAGE):
        layout = d.layout(IMAGE, dict.fromkeys(d.full_ranks(IMAGE, variant), 2), variant)
        block = targets.get("cpu").lower(CONV, layout, contraction_paths(CONV, layout, WINDOWS))
        texts.append(f"{variant or name}: {block.macs_at({'p': 2.0, 'q': 1.0}):g} multiply-adds a position\n{block}")
    golden("\n".join(texts))


def whole(op: Op = WIDE) -> Block:
    return Block((("w", (12, 5, 3, 3)),), (op,), "t0", tuple(IMAGE.items()), kind=CONV)


def test_a_dense_convolution_is_a_good_block_and_costs_what_it_costs() -> None:
    verify_block(whole())
    assert whole().macs == whole().macs_at({"p": 2.0, "q": 1.5}) == 12 * 5 * 9
    assert whole().peak_at({"p": 2.0, "q": 1.5}) == 10 * 3 + 12


def test_a_step_before_the_stride_runs_at_every_entry_of_the_input() -> None:
    still = (Window("p"), Window("q"))
    inner = Op("conv", "t0", ("x", "v"), Equation.parse("b g i p q, (g r) i -> b g r p q"), windows=still)
    outer = Op("conv", "t1", ("t0", "w"), Equation.parse("b g r p q, (g o) r p q -> b g o"), windows=WINDOWS)
    factors = (("v", (4, 5)), ("w", (12, 2, 3, 3)))
    block = Block(factors, (inner, outer), "t1", (*IMAGE.items(), ("r", 2)), kind=CONV)
    verify_block(block)
    assert block.macs_at({"p": 2.0, "q": 1.5}) == 3.0 * 4 * 5 + 12 * 2 * 9
    assert block.peak_at({"p": 2.0, "q": 1.5}) == max(3 * (10 + 4), 3 * 4 + 12)


def test_a_factor_without_some_window_axes_has_one_tap_there() -> None:
    op = Op("conv", "t0", ("x", "v"), Equation.parse("b g i p q, (g r) i q -> b g r p"), windows=WINDOWS)
    assert conv_shape(op, (4, 5, 3)) == (4, 5, 1, 3)


@pytest.mark.parametrize(
    ("equation", "windows", "message"),
    [
        ("b g i p q, (g o) i q p -> b g o", WINDOWS, r"is '\(g outputs\) inputs windows'"),
        ("b g i p q, g o i p q -> b g o", WINDOWS, r"is '\(g outputs\) inputs windows'"),
        ("b g i p q, (g o) i p q -> b g o", WINDOWS[:1], "not one for each of"),
        ("b g i p q, (g o) i p q -> b g o", WINDOWS[::-1], "not one for each of"),
    ],
)
def test_a_broken_convolution_is_refused(equation: str, windows: tuple[Window, ...], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_block(whole(Op("conv", "t0", ("x", "w"), Equation.parse(equation), windows=windows)))


def test_two_steps_that_slide_over_one_axis_are_refused() -> None:
    again = Op("conv", "t1", ("t0", "w"), WIDE.equation, windows=WINDOWS)
    with pytest.raises(VerificationError, match="two steps slide over one window axis"):
        verify_block(Block((("w", (12, 5, 3, 3)),), (WIDE, again), "t1", tuple(IMAGE.items()), kind=CONV))
