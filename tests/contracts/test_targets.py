"""Laws that every target keeps for every decomposition: its blocks compute what the factors stand for."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tdc import targets
from tdc.decompositions import get, rebuild
from tdc.ir import Block, Decline, Layout, Metric, OpKind, Window
from tdc.ir.verify import verify_block
from tdc.planning.path import contraction_paths
from tdc.testing import (
    EXAMPLE_AXES,
    applicable,
    assert_close,
    count_macs,
    random_factors,
    random_weight,
    random_weight_of,
    run_block,
    variants_of,
)

LINEAR = {"o": 12, "i": 8}
KINDS = {0: OpKind.LINEAR, 1: OpKind.CONV1D, 2: OpKind.CONV2D, 3: OpKind.CONV3D}
CASES = [(t, name, v) for t in targets.names() for name in applicable(LINEAR) for v in variants_of(name, LINEAR)]
ALL = [
    (target, name, variant, kind)
    for target in targets.names()
    for kind, axes in EXAMPLE_AXES.items()
    for name in applicable(axes)
    for variant in variants_of(name, axes)
]
IMAGES = [case for case in ALL if case[3].startswith("conv")]
each_case = pytest.mark.parametrize(("target", "name", "variant"), CASES)
each_kind = pytest.mark.parametrize(("target", "name", "variant", "kind"), ALL)
each_image = pytest.mark.parametrize(("target", "name", "variant", "kind"), IMAGES)


def lowered(target: str, layout: Layout, windows: tuple[Window, ...] = ()) -> Block:
    """The block that runs the factors, or builds the weight from them where they cannot run; without stride, padding
    and dilation where no ``windows`` are given.
    """
    plain = tuple(Window(axis, size) for axis, size in layout.sizes if axis in ("p", "q", "z"))
    kind, windows = KINDS[len(plain)], windows or plain
    machine = targets.get(target)
    block: Block | Decline
    try:
        block = machine.lower(kind, layout, contraction_paths(kind, layout, windows))
    except ValueError as error:
        assert "slide over" in str(error)  # noqa: PT017
        block = Decline(str(error))
    if not block:
        block = machine.lower_weight(kind, layout, windows, "stored")
    assert block, f"{target} declines {layout}: {block}"
    return block


def fitted(name: str, variant: str, axes: dict[str, int], rank: int, seed: int = 0) -> tuple[Layout, dict[str, Tensor]]:
    """Layout and factors with every rank at ``rank``, or at the full one where that is less; random factors of formats
    that take iterations to fit.
    """
    d = get(name)
    layout = d.layout(axes, {axis: min(rank, full) for axis, full in d.full_ranks(axes, variant).items()}, variant)
    if d.estimates:
        return layout, random_factors(layout, seed=seed)
    return layout, d.fit(random_weight_of(axes, seed=seed), layout, Metric("weight"))


def sides(name: str, variant: str) -> st.SearchStrategy[tuple[int, int]]:
    """Sizes for which the variant is proposed."""
    pairs = product(range(2, 18), repeat=2)
    return st.sampled_from([(o, i) for o, i in pairs if variant in variants_of(name, {"o": o, "i": i})])


@st.composite
def some_windows(draw: st.DrawFn, axes: dict[str, int]) -> tuple[tuple[Window, ...], list[int]]:
    """Any stride, dilation and padding, and lengths at which every window fits."""
    windows, lengths = [], []
    for axis in ("p", "q", "z"):
        if axis in axes:
            size, stride, dilation = axes[axis], draw(st.integers(1, 3)), draw(st.integers(1, 2))
            auto = draw(st.sampled_from(["", "", "upper", "lower"]))
            before, after = (0, 0) if auto else (draw(st.integers(0, 2)), draw(st.integers(0, 3)))
            windows.append(Window(axis, size, stride, dilation, before, after, auto))
            extent = dilation * (size - 1) + 1
            lengths.append(draw(st.integers(extent, extent + 4)))
    return tuple(windows), lengths


def torch_convolution(activation: Tensor, weight: Tensor, windows: tuple[Window, ...], groups: int) -> Tensor:
    pads = [size for w, n in reversed([*zip(windows, activation.shape[2:], strict=True)]) for size in w.padding(n)]
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[len(windows) - 1]
    strides, dilations = [w.stride for w in windows], [w.dilation for w in windows]
    return run(functional.pad(activation, pads), weight, None, strides, 0, dilations, groups)


@each_case
@settings(max_examples=30)
@given(data=st.data(), rank=st.integers(1, 17), batch=st.integers(1, 5))
def test_a_block_is_the_dense_operator_with_the_rebuilt_weight(
    target: str, name: str, variant: str, data: st.DataObject, rank: int, batch: int
) -> None:
    rows, columns = data.draw(sides(name, variant))
    layout, factors = fitted(name, variant, {"o": rows, "i": columns}, rank)
    activation = random_weight(batch, columns, seed=5)
    dense = activation @ rebuild(factors, layout).T
    assert_close(run_block(lowered(target, layout), factors, activation), dense, 1e-10)


@each_image
@settings(max_examples=12)
@given(data=st.data(), rank=st.integers(1, 9))
def test_a_block_is_the_dense_convolution_with_the_rebuilt_weight(
    target: str, name: str, variant: str, kind: str, data: st.DataObject, rank: int
) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    windows, lengths = data.draw(some_windows(axes))
    layout, factors = fitted(name, variant, axes, rank)
    block = lowered(target, layout, windows)
    verify_block(block)
    activation = torch.randn(2, axes["g"] * axes["i"], *lengths, dtype=torch.float64)
    dense = torch_convolution(activation, rebuild(factors, layout), windows, axes["g"])
    assert_close(run_block(block, factors, activation), dense, 1e-10)


@each_case
@given(data=st.data(), rank=st.integers(1, 17))
@settings(max_examples=20)
def test_a_block_counts_its_multiply_adds(target: str, name: str, variant: str, data: st.DataObject, rank: int) -> None:
    rows, columns = data.draw(sides(name, variant))
    layout, factors = fitted(name, variant, {"o": rows, "i": columns}, rank)
    block = lowered(target, layout)
    assert block.macs == count_macs(block, factors)


@each_image
@settings(max_examples=12)
@given(data=st.data(), rank=st.integers(1, 9))
def test_a_block_of_a_convolution_counts_its_multiply_adds(
    target: str, name: str, variant: str, kind: str, data: st.DataObject, rank: int
) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    windows, lengths = data.draw(some_windows(axes))
    layout, factors = fitted(name, variant, axes, rank)
    block = lowered(target, layout, windows)
    positions = {w.axis: w.positions(n) for w, n in zip(windows, lengths, strict=True)}
    ratios = {w.axis: n / positions[w.axis] for w, n in zip(windows, lengths, strict=True)}
    counted = block.macs_at(ratios) * prod(positions.values())
    assert counted == pytest.approx(count_macs(block, factors, lengths), rel=1e-12)


@each_kind
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_block_is_well_formed_and_never_joins_constants(
    target: str, name: str, variant: str, kind: str, rank: int
) -> None:
    layout, _ = fitted(name, variant, dict(EXAMPLE_AXES[kind]), rank)
    block = lowered(target, layout)
    verify_block(block)
    constants = {factor for factor, _ in block.factors}
    assert all(set(op.inputs) - constants or op.kind == "weight" for op in block.ops)
    assert {key: layout.shapes[key] for key in constants} == dict(block.factors)


BIG = {0: {"o": 64, "i": 48}, 1: {"p": 5}, 2: {"p": 5, "q": 5}, 3: {"p": 3, "q": 3, "z": 3}}


@pytest.mark.parametrize("target", targets.names())
@pytest.mark.parametrize("taps", BIG)
def test_low_rank_is_cheaper_than_dense(target: str, taps: int) -> None:
    axes = BIG[0] if not taps else {"g": 1, "o": 32, "i": 24, **BIG[taps]}
    for name in (n for n in applicable(axes) if not get(n).storage):
        for variant in variants_of(name, axes):
            layout, _ = fitted(name, variant, axes, 3)
            assert lowered(target, layout).macs < prod(axes.values())


@each_case
def test_lowering_is_a_function(target: str, name: str, variant: str) -> None:
    first = lowered(target, fitted(name, variant, LINEAR, 3)[0])
    second = lowered(target, fitted(name, variant, LINEAR, 3, seed=1)[0])
    assert first == second


@pytest.mark.parametrize("target", targets.names())
@given(full=st.integers(1, 4096))
def test_rank_steps_leave_at_least_eight_ranks_or_are_one(target: str, full: int) -> None:
    """The multiple that suits the machine, halved while that leaves fewer than eight ranks."""
    machine = targets.get(target)
    step = machine.rank_step(full)
    assert machine.rank_multiple % step == 0
    assert step == 1 or full >= 8 * step
    assert step == machine.rank_multiple or full < 8 * machine.rank_multiple
    assert machine.rank_step(full + 1) >= step


@pytest.mark.parametrize("target", targets.names())
def test_a_target_states_name_and_summary(target: str) -> None:
    assert targets.get(target).name == target
    assert targets.get(target).summary.strip()
    assert targets.get("auto").name in targets.names()


@pytest.mark.parametrize("kind", EXAMPLE_AXES)
def test_float32_blocks_agree_with_float32_rebuilds(kind: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    windows = tuple(Window(axis, size, 1, 1, size - 1, 0) for axis, size in axes.items() if axis in ("p", "q", "z"))
    for name in applicable(axes):
        for variant in variants_of(name, axes):
            layout, factors = fitted(name, variant, axes, 99)
            stored = {key: f.float() if f.is_floating_point() else f for key, f in factors.items()}
            block = lowered(targets.get("auto").name, layout, windows)
            weight, width = rebuild(factors, layout).float(), axes.get("g", 1) * axes["i"]
            x = torch.randn(3, width, *([5] * len(windows)))
            dense = torch_convolution(x, weight, windows, axes["g"]) if windows else x @ weight.T
            assert_close(run_block(block, stored, x).float(), dense, 1e-5)
