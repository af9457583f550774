"""Seconds by hand where the model is plain arithmetic, and labels that say what a figure is worth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc import targets
from tdc.decompositions import get
from tdc.ir import Block, OpKind, Window
from tdc.ir.machine import Compute, Figure, Machine, Memory, Table, Timing, Work
from tdc.planning.path import contraction_paths
from tdc.planning.seconds import LABELS, Clock, Estimate, _Grid, amount, fitted, roofline
from tdc.planning.works import Call, call_of, dense_block, works_of
from tdc.testing import EXAMPLE_AXES, applicable, random_site, random_weight, random_weight_of, variants_of

LINES = (1.0, 16.0, 256.0)


def figure(value: float, unit: str = "1") -> Figure:
    return Figure(value, unit, "assumed")


def machine(overlap: float = 0.5) -> Machine:
    """1e9 op/s at efficiency 1/2, tiles of 1 x 16 x 4; 1 kB at 1e9 B/s inside, 1e8 B/s outside; launch 1 us."""
    compute = Compute("float32", figure(1e9, "op/s"), figure(0.5), (figure(1), figure(16), figure(4)))
    memory = (Memory("in", figure(1000, "B"), figure(1e9, "B/s")), Memory("out", figure(1e9, "B"), figure(1e8, "B/s")))
    ranks = figure(1), figure(1)
    return Machine("m", "cpu", "s", *ranks, (compute,), memory, figure(1e-6, "s"), figure(overlap), ("MatMul",))


def table(times: Mapping[Work, float]) -> Table:
    return Table({}, {work: Timing(seconds, 2 * seconds) for work, seconds in times.items()}, "today")


def grid(seconds: float = 1e-3) -> dict[Work, float]:
    """Products at every combination of three sizes, all of the same time."""
    return {Work("gemm", (m, k, n)): seconds for m in LINES for k in LINES for n in LINES}


def test_a_product_by_the_model_is_what_it_is_by_hand() -> None:
    computing = 2 * 3 * 8 * 32 / 5e8  # 3 rows, 7 inputs padded to 8, 17 outputs to 32
    moving = 4 * 7 * 17 / 1e8 + 4 * 3 * (7 + 17) / 1e9  # the weight from outside, the activations fit inside
    for overlap in (0.5, 1.0):
        hidden = overlap * min(computing, moving)
        told = Clock(machine(overlap)).work(Work("gemm", (3, 7, 17)))
        assert told.seconds == pytest.approx(computing + moving - hidden + 1e-6, rel=1e-12)
        assert told.label == "modelled"


@given(st.integers(1, 64), st.integers(1, 64))
def test_ranks_between_multiples_of_the_tile_are_free(rank: int, rows: int) -> None:
    """Of computing; what is moved grows."""
    still = machine()
    padded = math.ceil(rank / 16) * 16

    def computing(outputs: int) -> float:
        work = Work("gemm", (float(rows), 8.0, float(outputs)))
        own = amount(work)
        moving = 4 * own.weights / 1e8 + 4 * own.activations / still.bandwidth(4 * own.activations)
        total = roofline(machine(1e-12), work) - 1e-6
        return total - moving

    assert computing(rank) == pytest.approx(computing(padded), rel=1e-6)


def test_a_point_of_the_table_is_measured_between_points_is_interpolated_and_beyond_is_modelled() -> None:
    clock = Clock(machine(), table(grid()))
    assert clock.work(Work("gemm", (16, 256, 1))) == Estimate(1e-3, "measured")
    assert clock.work(Work("gemm", (20, 200, 3))).label == "interpolated"
    for sizes in ((300, 16, 16), (1, 512, 16), (16, 16, 1024)):
        assert clock.work(Work("gemm", sizes)).label == "modelled"
    assert clock.work(Work("gemm", (16, 16, 16), "bfloat16")).label == "modelled"
    assert clock.work(Work("bmm", (4, 16, 16, 16))).label == "modelled"
    assert clock.work(Work("take", (4, 16))).label == "modelled"


def test_beyond_the_table_the_model_is_as_far_off_as_at_its_edge() -> None:
    clock = Clock(machine(), table(grid()))
    edge, beyond = Work("gemm", (256, 256, 16)), Work("gemm", (4096, 256, 16))
    ratio = clock.work(edge).seconds / roofline(clock.model, edge)
    assert clock.work(beyond).seconds == pytest.approx(ratio * roofline(clock.model, beyond), rel=1e-12)


def test_a_cell_without_a_corner_is_bounded_by_further_lines() -> None:
    times = {w: s for w, s in grid().items() if w.sizes != (16.0, 16.0, 16.0)}
    clock = Clock(machine(), table(times))
    assert clock.work(Work("gemm", (4, 4, 4))).label == "interpolated"
    assert clock.work(Work("gemm", (16, 16, 16))).label == "interpolated"
    corners = {w: s for w, s in grid().items() if 16.0 not in w.sizes and w.sizes != (256.0, 256.0, 256.0)}
    assert Clock(machine(), table(corners)).work(Work("gemm", (4, 4, 4))).label == "modelled"


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.data())
def test_what_is_linear_in_the_logarithms_is_met_exactly(slopes: list[float], data: st.DataObject) -> None:
    def value(sizes: tuple[float, ...]) -> float:
        return slopes[0] + sum(s * math.log(x) for s, x in zip(slopes[1:], sizes, strict=True))

    points = {(a, b, c): value((a, b, c)) for a in LINES for b in LINES for c in LINES}
    sizes = tuple(data.draw(st.floats(1, 256)) for _ in range(3))
    found, inside = _Grid.of(points).at(sizes)
    assert inside
    assert found == pytest.approx(value(sizes), abs=1e-9)


def test_a_sum_is_worth_what_its_worst_part_is() -> None:
    parts = [Estimate(1.0, label) for label in LABELS]
    assert sum(parts[1:], parts[0]) == Estimate(3.0, "modelled")
    assert parts[0] + parts[1] == Estimate(2.0, "interpolated")
    assert parts[1].times(3) == Estimate(3.0, "interpolated")


def test_a_machine_with_a_table_has_its_figures() -> None:
    times = {
        Work("launch", ()): 5e-6,
        Work("copy", (500.0,)): 1e-6,
        Work("copy", (8000.0,)): 1e-4,
        Work("gemm", (64.0, 64.0, 64.0)): 2 * 64**3 / 3e9,
        Work("gemm", (1.0, 8.0, 8.0)): 1e-5,
    }
    own = fitted(machine(), table(times))
    assert own.launch == Figure(5e-6, "s", "measured", "today")
    assert own.computes("float32").rate == pytest.approx(3e9)
    assert [level.bandwidth.value for level in own.memory] == [5e8, 8e7]
    assert {level.bandwidth.source for level in own.memory} == {"measured"}


KINDS = {0: OpKind.LINEAR, 1: OpKind.CONV1D, 2: OpKind.CONV2D, 3: OpKind.CONV3D}


@pytest.mark.parametrize("kind", EXAMPLE_AXES)
def test_the_works_of_a_block_have_its_multiply_adds(kind: str) -> None:
    """For every format that runs with its factors, at a stride of two."""
    axes = dict(EXAMPLE_AXES[kind])
    windows = tuple(Window(axis, size, 2) for axis, size in axes.items() if axis in ("p", "q", "z"))
    ratios = tuple((window.axis, 2.25) for window in windows)
    call = Call(3.0, 7.0 if windows else 1.0, ratios)
    seen = 0
    for name in applicable(axes):
        for variant in variants_of(name, axes):
            full = get(name).full_ranks(axes, variant)
            layout = get(name).layout(axes, {axis: min(3, rank) for axis, rank in full.items()}, variant)
            try:
                paths = contraction_paths(KINDS[len(windows)], layout, windows)
            except ValueError:
                continue
            block = targets.get("cpu").lower(KINDS[len(windows)], layout, paths)
            if not isinstance(block, Block):
                continue
            works = [work for _, own in works_of(block, call) for work in own]
            counted = sum(prod(amount(w).product) for w in works if amount(w).product)
            assert counted == pytest.approx(block.macs_at(dict(ratios)) * call.rows, rel=1e-9), f"{name}/{variant}"
            seen += 1
    assert seen >= 2


def test_a_stored_weight_takes_nothing_and_a_rebuilt_one_is_charged() -> None:
    axes = {"o": 32, "i": 24}
    layout = get("svd").layout(axes, {"r": 4}, "")
    call = Call(5.0)
    kinds = {}
    for execution in ("stored", "rebuilt"):
        block = targets.get("cpu").lower_weight(OpKind.LINEAR, layout, (), execution)
        assert isinstance(block, Block)
        kinds[execution] = [work.kind for _, own in works_of(block, call) for work in own]
        assert Clock(machine()).block(block, call).seconds > 0
    assert kinds == {"stored": ["gemm"], "rebuilt": ["rebuild", "gemm"]}


def test_values_that_another_site_computes_are_left_out() -> None:
    site = random_site(random_weight(32, 24))
    layout = get("svd").layout(site.axes, {"r": 4}, "")
    block = targets.get("cpu").lower(site.kind, layout, contraction_paths(site.kind, layout))
    assert isinstance(block, Block)
    clock, call = Clock(machine()), Call(5.0)
    whole, own = clock.block(block, call), clock.block(block, call, {block.ops[0].output})
    assert own == clock.work(Work("gemm", (5, 4, 32)))
    assert whole.seconds == pytest.approx(own.seconds + clock.work(Work("gemm", (5, 24, 4))).seconds)


def test_the_call_of_a_site_has_the_rows_of_each_use() -> None:
    tied = random_site(random_weight(32, 24), uses=2)
    assert call_of(tied, 10.0) == Call(5.0, dtype="float64")
    windows = (Window("p", 3, 2), Window("q", 3, 2))
    conv = random_site(random_weight_of({"g": 1, "o": 8, "i": 4, "p": 3, "q": 3}), windows=windows)
    assert call_of(conv, 50.0) == Call(1.0, 50.0, (("p", 2.0), ("q", 2.0)), "float64")
    block = dense_block(conv)
    ((_, (work,)),) = works_of(block, Call(2.0, 25.0, (("p", 2.0), ("q", 2.0))))
    assert (work.kind, work.sizes, work.read) == ("conv 3x3/2", (2.0, 25.0, 4.0, 8.0), 4.0)


@pytest.mark.parametrize(
    ("window", "layout", "label"),
    [
        (Window("p", 3, 1, 1, 1, 1), "", "interpolated"),
        (Window("p", 3, 2, 1, 1, 1), "", "modelled"),
        (Window("p", 3, 1, 2, 2, 2), "", "modelled"),
        (Window("p", 3, 1, 1, 1, 1), "channels_last", "modelled"),
    ],
)
def test_what_slides_in_another_way_than_what_was_measured_is_modelled(window: Window, layout: str, label: str) -> None:
    """A stride, a dilation or another memory format makes another operation of it."""
    weight = random_weight_of({"g": 1, "o": 8, "i": 4, "p": 3, "q": 3})
    windows = (window, Window("q", 3, window.stride, window.dilation, window.before, window.after))
    site = dataclasses.replace(random_site(weight, windows=windows), layout=layout, dtype="float32")
    sizes = itertools.product((1.0, 16.0), (4.0, 64.0), (2.0, 32.0), (2.0, 32.0))
    clock = Clock(machine(), table({Work("conv 3x3", s): 1e-3 for s in sizes}))
    told = clock.block(dense_block(site), call_of(site, 50.0))
    assert told.label == label
    assert told.seconds > 0
