from __future__ import annotations

from collections.abc import Callable

import pytest

from tdc import decompositions, targets
from tdc.errors import VerificationError
from tdc.ir import Block, Equation, Op, OpKind
from tdc.ir.verify import verify_block
from tdc.planning.path import contraction_paths

SIZES = (("o", 12), ("i", 8), ("r", 3))
FACTORS = (("v", (3, 8)), ("u", (12, 3)))
INNER, OUTER = Equation.parse("b i, r i -> b r"), Equation.parse("b r, o r -> b o")
FIRST, SECOND = Op("matmul", "t0", ("x", "v"), INNER), Op("matmul", "t1", ("t0", "u"), OUTER)


@pytest.mark.parametrize("name", decompositions.names())
def test_blocks_print_as_straight_lines(golden: Callable[[str], None], name: str) -> None:
    d, texts = decompositions.get(name), []
    for variant in d.equations:
        for rank in (3, 8):
            layout = d.layout({"o": 12, "i": 8}, dict.fromkeys(d.full_ranks({"o": 12, "i": 8}), rank), variant)
            block = targets.get("cpu").lower(layout, contraction_paths(OpKind.LINEAR, layout))
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
        (FACTORS, (Op("conv", "t0", ("x", "v")), SECOND), "t1", "unknown primitive 'conv'"),
        (FACTORS, (SECOND, FIRST), "t1", r"uses \['t0'\] before it is defined"),
        (FACTORS, (Op("matmul", "w", ("u", "v"), OUTER), FIRST, SECOND), "t1", "has only constant inputs"),
        (FACTORS, (FIRST, SECOND, FIRST), "t1", "assigns 't0' a second time"),
        (FACTORS, (Op("matmul", "t0", ("x", "v")), SECOND), "t1", "only matmul, has an equation"),
        (FACTORS, (FIRST, SECOND), "t2", "'t2' is never computed"),
        (FACTORS, (FIRST,), "t0", r"factors \['u'\] are never used"),
    ],
)
def test_a_broken_block_is_refused_with_what_is_broken(
    factors: tuple[tuple[str, tuple[int, ...]], ...], ops: tuple[Op, ...], output: str, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_block(Block(factors, ops, output, SIZES))
