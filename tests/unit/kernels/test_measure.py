from __future__ import annotations

import pytest
import torch

from tdc import kernels
from tdc.ir import Block, Decline, Equation, Op, OpKind, Window
from tdc.kernels import measure

pytestmark = pytest.mark.usefixtures("compiled")

LINEAR = Block(
    (("v", (7, 24)), ("u", (20, 7))),
    (
        Op("matmul", "t0", ("x", "v"), Equation.parse("b i, r i -> b r")),
        Op("matmul", "t1", ("t0", "u"), Equation.parse("b r, o r -> b o")),
    ),
    "t1",
    (("o", 20), ("i", 24), ("r", 7)),
)
THREE, ONE = (Window("p", 3, 1, 1, 1, 1), Window("q", 3, 1, 1, 1, 1)), (Window("p"), Window("q"))
CONV = Block(
    (("v", (7, 5, 3, 3)), ("u", (6, 7))),
    (
        Op("conv", "t0", ("x", "v"), Equation.parse("b g i p q, (g r) i p q -> b g r"), windows=THREE),
        Op("conv", "t1", ("t0", "u"), Equation.parse("b g r, (g o) r -> b g o"), windows=ONE),
    ),
    "t1",
    (("g", 1), ("o", 6), ("i", 5), ("p", 3), ("q", 3), ("r", 7)),
    kind=OpKind.CONV2D,
)


@pytest.mark.parametrize(("block", "shapes"), [(LINEAR, [(1, 24), (5, 24)]), (CONV, [(1, 5, 6, 6), (2, 5, 9, 7)])])
@pytest.mark.parametrize("bias", [True, False])
def test_a_choice_has_seconds_for_every_shape(
    block: Block, shapes: list[tuple[int, ...]], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "GAIN", 0.0)
    state = torch.get_rng_state()
    found = kernels.choose(block, bias, shapes)
    assert isinstance(found, kernels.Choice)
    assert found.match == kernels.match(block)
    assert found.faster == (True, True)
    assert found.seconds == found.kernel
    assert min(*found.kernel, *found.stock) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_that_gains_nothing_is_declined_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GAIN", 1e9)
    found = kernels.choose(LINEAR, True, [(3, 24)])
    assert isinstance(found, Decline)
    assert found.reason.startswith("two products: ")
    assert found.reason.endswith(" times as fast as stock operators")


def test_a_block_without_a_kernel_is_declined() -> None:
    block = Block(LINEAR.factors, LINEAR.ops[:1] * 3, "t0", LINEAR.sizes)
    assert isinstance(kernels.choose(block, True, [(3, 24)]), Decline)


def test_where_the_kernel_is_slower_the_stock_operators_count() -> None:
    match = kernels.match(LINEAR)
    assert isinstance(match, kernels.Match)
    choice = kernels.Choice(match, (1.0, 5.0), (2.0, 4.0), (True, False))
    assert choice.seconds == (1.0, 4.0)
