"""The rows that a convolution's weight meets, against torch's unfold and a loop over positions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tdc.ir import Site, Window
from tdc.statistics import Collector
from tdc.statistics.patches import input_rows, window_lengths
from tdc.testing import random_site

AXES = ("p", "q", "z")


@st.composite
def problems(draw: st.DrawFn, axes: int) -> tuple[Site, Tensor]:
    groups, inputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    windows, lengths = [], []
    for axis in AXES[:axes]:
        size, stride, dilation = (draw(st.integers(1, 3)) for _ in range(3))
        auto = draw(st.sampled_from(["", "", "upper", "lower"]))
        pads = (0, 0) if auto else (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        windows.append(Window(axis, size, stride, dilation, *pads, auto))
        lengths.append(windows[-1].extent + draw(st.integers(0, 3)))
    weight = torch.randn(2 * groups, inputs, *(w.size for w in windows))
    x = torch.randn(draw(st.integers(1, 3)), groups * inputs, *lengths)
    return random_site(weight, groups=groups, windows=windows), x


def rows_of(site: Site, x: Tensor, seed: int = 0) -> Tensor:
    return torch.cat([rows for rows, _ in input_rows(site, x, seed)])


def padded(site: Site, x: Tensor) -> Tensor:
    pads = [w.padding(n) for w, n in zip(site.windows, x.shape[2:], strict=True)]
    return functional.pad(x, [size for pair in reversed(pads) for size in pair])


@settings(max_examples=60)
@given(problem=problems(2))
def test_patches_of_images_are_the_columns_of_unfold(problem: tuple[Site, Tensor]) -> None:
    site, x = problem
    kernel, dilation, stride = ([getattr(w, k) for w in site.windows] for k in ("size", "dilation", "stride"))
    columns = functional.unfold(padded(site, x), kernel, dilation, 0, stride)
    groups, _, width = site.matrix
    assert torch.equal(rows_of(site, x), columns.mT.reshape(-1, groups, width))


@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=20)
@given(data=st.data())
def test_patches_are_those_of_a_loop_over_positions(axes: int, data: st.DataObject) -> None:
    site, x = data.draw(problems(axes))
    counts = [w.positions(n) for w, n in zip(site.windows, x.shape[2:], strict=True)]
    rows = []
    for example, *place in product(range(len(x)), *map(range, counts)):
        taps = [
            slice(k * w.stride, k * w.stride + w.extent, w.dilation) for k, w in zip(place, site.windows, strict=True)
        ]
        rows.append(padded(site, x)[(example, slice(None), *taps)].reshape(site.matrix[0], site.matrix[2]))
    assert torch.equal(rows_of(site, x), torch.stack(rows))
    assert [(a, b, c) for a, b, c in window_lengths(site, x)] == list(zip(AXES, x.shape[2:], counts, strict=False))


@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=20)
@given(data=st.data())
def test_the_weight_times_the_patches_is_the_convolution(axes: int, data: st.DataObject) -> None:
    site, x = data.draw(problems(axes))
    groups, outputs, width = site.matrix
    weight = torch.randn(
        groups * outputs, width // int(np.prod([w.size for w in site.windows])), *(w.size for w in site.windows)
    )
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    stride, dilation = [w.stride for w in site.windows], [w.dilation for w in site.windows]
    expected = run(padded(site, x), weight, None, stride, 0, dilation, groups)
    found = torch.einsum("mgn,gon->mgo", rows_of(site, x), weight.reshape(groups, outputs, width))
    torch.testing.assert_close(found.reshape(len(x), -1, groups * outputs).mT.reshape(expected.shape), expected)


def image_site(*, channels: int = 3, order: int = 0, groups: int = 1, seed: int = 0) -> Site:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4 * groups, channels, 3, 3, generator=generator)
    windows = (Window("p", 3, 1, 1, 1, 1), Window("q", 3, 1, 1, 1, 1))
    return random_site(weight, order=order, groups=groups, windows=windows)


def test_an_example_without_a_batch_axis_is_one_example() -> None:
    x = torch.randn(3, 6, 6)
    assert torch.equal(rows_of(image_site(), x), rows_of(image_site(), x[None]))


def test_of_many_positions_a_sample_is_drawn_and_the_same_one_for_a_seed() -> None:
    x = torch.randn(8, 3, 40, 40)
    sample = rows_of(image_site(), x, 1)
    assert len(sample) == 4096
    assert torch.equal(sample, rows_of(image_site(), x, 1))
    assert not torch.equal(sample, rows_of(image_site(), x, 2))
    padded_rows = functional.unfold(functional.pad(x, [1] * 4), 3).mT.reshape(-1, 27)
    known = {row.tobytes() for row in padded_rows.numpy()}
    assert all(row.tobytes() in known for row in sample[:, 0].numpy())
    assert len({row.tobytes() for row in sample[:, 0].numpy()}) == 4096, "no position is drawn twice"


def test_the_moments_of_a_sample_are_near_those_of_all_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = functional.avg_pool2d(torch.randn(8, 3, 82, 82, generator=generator), 3, 1, 0)
    collector, site = Collector(), image_site()
    collector.tap(site, x)
    collector.end_batch()
    moments = collector.moments[collector.group[0]]
    rows = functional.unfold(functional.pad(x, [1] * 4), 3).mT.reshape(-1, 27).double()
    exact = rows.T @ rows / len(rows)
    assert moments.rows == 4096
    assert moments.seen == len(rows) == 8 * 80 * 80
    difference = (moments.total[0] / moments.rows - exact).norm() / exact.norm()
    assert float(difference) < 3 * (27 / 4096) ** 0.5


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_the_sums_over_all_patches_of_each_group(groups: int) -> None:
    collector, site, batches = (
        Collector(),
        image_site(groups=groups),
        [torch.randn(2, 3 * groups, 5, 7) for _ in range(2)],
    )
    for x in batches:
        collector.tap(site, x)
        collector.end_batch()
    moments = collector.moments[collector.group[0]]
    for g in range(groups):
        parts = [functional.unfold(x[:, 3 * g : 3 * g + 3], 3, 1, 1).mT.reshape(-1, 27).double() for x in batches]
        rows = torch.cat(parts)
        torch.testing.assert_close(moments.total[g], rows.T @ rows, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(moments.sum[g], rows.sum(0), rtol=1e-6, atol=1e-5)
    assert moments.rows == moments.seen == 2 * 2 * 5 * 7
    assert collector.lengths[0] == {"p": (10, 10), "q": (14, 14)}


def test_convolutions_share_their_sums_only_where_their_windows_and_groups_agree() -> None:
    x, collector = torch.randn(2, 4, 6, 6), Collector()
    sites = [image_site(channels=4, order=k, seed=k) for k in range(2)] + [image_site(channels=2, order=2, groups=2)]
    sites.append(random_site(torch.randn(4, 4, 1, 1), order=3))
    for site in sites:
        collector.tap(site, x)
    collector.end_batch()
    groups = [collector.group[k] for k in range(4)]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


def test_patches_with_a_value_that_is_not_finite_are_left_out() -> None:
    x, collector = torch.randn(1, 3, 6, 6), Collector()
    x[0, 0, 2, 3] = float("nan")
    collector.tap(image_site(), x)
    collector.end_batch()
    moments = collector.moments[collector.group[0]]
    assert (moments.rows, moments.dropped, moments.seen) == (36 - 9, 9, 36)
    assert bool(torch.isfinite(moments.total).all())
