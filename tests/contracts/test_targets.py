"""Laws that every target keeps for every decomposition: its blocks compute what the factors stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc import decompositions, targets
from tdc.decompositions import rebuild
from tdc.ir import Block, Layout, Metric, OpKind
from tdc.ir.verify import verify_block
from tdc.planning.path import contraction_paths
from tdc.testing import assert_close, count_macs, random_weight, run_block

CASES = [
    (target, name, variant)
    for target in targets.names()
    for name in decompositions.names()
    for variant in decompositions.get(name).equations
]
each_case = pytest.mark.parametrize(("target", "name", "variant"), CASES)


def lowered(target: str, layout: Layout) -> Block:
    block = targets.get(target).lower(layout, contraction_paths(OpKind.LINEAR, layout))
    assert block, f"{target} declines {layout}: {block}"
    return block


def fitted(name: str, variant: str, weight: Tensor, rank: int) -> tuple[Layout, dict[str, Tensor]]:
    """Layout and factors with every rank at ``rank``, or at the full one where that is less."""
    d = decompositions.get(name)
    axes = {"o": weight.shape[0], "i": weight.shape[1]}
    layout = d.layout(axes, {axis: min(rank, full) for axis, full in d.full_ranks(axes).items()}, variant)
    return layout, d.fit(weight, layout, Metric("weight"))


@each_case
@settings(max_examples=30)
@given(rows=st.integers(2, 17), columns=st.integers(2, 17), rank=st.integers(1, 17), batch=st.integers(1, 5))
def test_a_block_is_the_dense_operator_with_the_rebuilt_weight(
    target: str, name: str, variant: str, rows: int, columns: int, rank: int, batch: int
) -> None:
    layout, factors = fitted(name, variant, random_weight(rows, columns), rank)
    activation = random_weight(batch, columns, seed=5)
    dense = activation @ rebuild(factors, layout).T
    assert_close(run_block(lowered(target, layout), factors, activation), dense, 1e-10)


@each_case
@given(rows=st.integers(2, 17), columns=st.integers(2, 17), rank=st.integers(1, 17))
@settings(max_examples=20)
def test_a_block_counts_its_multiply_adds(
    target: str, name: str, variant: str, rows: int, columns: int, rank: int
) -> None:
    layout, factors = fitted(name, variant, random_weight(rows, columns), rank)
    block = lowered(target, layout)
    assert block.macs == count_macs(block, factors)


@each_case
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_block_is_well_formed_and_never_joins_constants(target: str, name: str, variant: str, rank: int) -> None:
    layout, _ = fitted(name, variant, random_weight(12, 8), rank)
    block = lowered(target, layout)
    verify_block(block)
    constants = {factor for factor, _ in block.factors}
    assert all(set(op.inputs) - constants for op in block.ops)
    assert {key: layout.shapes[key] for key in constants} == dict(block.factors)


@each_case
def test_low_rank_is_cheaper_than_dense(target: str, name: str, variant: str) -> None:
    layout, _ = fitted(name, variant, random_weight(64, 48), 4)
    assert lowered(target, layout).macs < 64 * 48


@each_case
def test_lowering_is_a_function(target: str, name: str, variant: str) -> None:
    first = lowered(target, fitted(name, variant, random_weight(12, 8), 3)[0])
    second = lowered(target, fitted(name, variant, random_weight(12, 8, seed=1), 3)[0])
    assert first == second


@pytest.mark.parametrize("target", targets.names())
@given(rows=st.integers(1, 4096), columns=st.integers(1, 4096))
def test_rank_steps_leave_at_least_seven_ranks_or_are_one(target: str, rows: int, columns: int) -> None:
    machine = targets.get(target)
    step = machine.rank_step({"o": rows, "i": columns})
    assert step in (1, machine.rank_multiple)
    assert step == 1 or min(rows, columns) >= 8 * step


@pytest.mark.parametrize("target", targets.names())
def test_a_target_states_name_and_summary(target: str) -> None:
    assert targets.get(target).name == target
    assert targets.get(target).summary.strip()
    assert targets.get("auto").name in targets.names()


def test_float32_blocks_agree_with_float32_rebuilds() -> None:
    weight = random_weight(12, 8).float()
    for name in decompositions.names():
        layout, factors = fitted(name, decompositions.get(name).variant({"o": 12, "i": 8}), weight.double(), 8)
        stored = {key: f.float() if f.is_floating_point() else f for key, f in factors.items()}
        block = lowered(targets.get("auto").name, layout)
        assert_close(run_block(block, stored, torch.eye(8)).T, weight, 1e-5)
