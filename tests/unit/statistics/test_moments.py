from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc.ir import Site
from tdc.statistics import Collector, Moments
from tdc.statistics.moments import gram
from tdc.testing import random_site, random_weight


def site(order: int, columns: int = 6) -> Site:
    return random_site(random_weight(4, columns, seed=order), order=order)


def batch(seed: int = 0, shape: tuple[int, ...] = (5, 6)) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(moments: Moments, *activations: Tensor) -> None:
    """Equal to the sums that numpy makes of all rows."""
    rows = np.concatenate([a.double().numpy().reshape(-1, a.shape[-1]) for a in activations])
    np.testing.assert_allclose(moments.total.numpy()[0], rows.T @ rows, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.sum.numpy()[0], rows.sum(0), rtol=1e-12, atol=1e-12)
    assert moments.rows == len(rows)
    assert moments.total.dtype == moments.sum.dtype == torch.float64


def test_sums_are_those_of_numpy_over_all_leading_axes() -> None:
    activations = [batch(0), batch(1, (2, 3, 6)), batch(2, (6,))]
    moments = Moments.zeros(1, 6)
    for activation in activations:
        moments.add(activation.reshape(-1, 1, 6))
    agree(moments, *activations)


@pytest.mark.parametrize("width", [511, 512, 700, 1024])
def test_products_by_blocks_are_whole_and_symmetric(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(2, 40, width, generator=generator, dtype=torch.float64)
    scaled = rows * torch.rand(40, 1, generator=generator, dtype=torch.float64)
    found = gram(rows, scaled)
    torch.testing.assert_close(found, rows.mT @ scaled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    activation = (100 * batch(0, (64, 6))).to(dtype)
    moments = Moments.zeros(1, 6)
    moments.add(activation[:, None])
    exact = activation.double().T @ activation.double()
    assert float((moments.total[0] - exact).norm() / exact.norm()) < 64 * torch.finfo(torch.float32).eps


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    activation = batch()
    activation[1, 2], activation[3, 0] = float("nan"), float("inf")
    moments = Moments.zeros(1, 6)
    moments.add(activation[:, None])
    agree(moments, activation[[0, 2, 4]])
    assert moments.dropped == 2


def test_sites_that_read_the_same_tensor_share_their_sums() -> None:
    collector, first, second = Collector(), batch(0), batch(1)
    for x in (first, second):
        collector.tap(site(0), x)
        collector.tap(site(1), x)
        collector.end_batch()
    assert collector.group[0] == collector.group[1]
    agree(collector.moments[collector.group[0]], first, second)


def test_equal_values_in_two_tensors_are_not_shared() -> None:
    collector = Collector()
    x, same = batch(), batch()
    collector.tap(site(0), x)
    collector.tap(site(1), same)
    collector.end_batch()
    assert collector.group[0] != collector.group[1]


def test_a_new_tensor_at_the_address_of_a_dead_one_is_another_activation() -> None:
    collector, kept = Collector(), []
    for order in range(20):
        x = batch(order)
        kept.append(x.clone())
        collector.tap(site(order), x)
        del x
    collector.end_batch()
    for order, x in enumerate(kept):
        agree(collector.moments[collector.group[order]], x)


def test_sites_part_when_they_read_different_tensors_and_keep_what_they_saw_together() -> None:
    collector, together, left, right = Collector(), batch(0), batch(1), batch(2)
    for first, second in ((together, together), (left, right)):
        collector.tap(site(0), first)
        collector.tap(site(1), second)
        collector.end_batch()
    agree(collector.moments[collector.group[0]], together, left)
    agree(collector.moments[collector.group[1]], together, right)


def test_sites_that_have_parted_stay_apart() -> None:
    collector, x, y, z = Collector(), batch(0), batch(1), batch(2)
    for first, second in ((x, y), (z, z)):
        collector.tap(site(0), first)
        collector.tap(site(1), second)
        collector.end_batch()
    agree(collector.moments[collector.group[0]], x, z)
    agree(collector.moments[collector.group[1]], y, z)


def test_a_site_that_a_batch_does_not_reach_keeps_its_sums() -> None:
    collector, x, y = Collector(), batch(0), batch(1)
    collector.tap(site(0), x)
    collector.tap(site(1), x)
    collector.end_batch()
    collector.tap(site(0), y)
    collector.end_batch()
    agree(collector.moments[collector.group[0]], x, y)
    agree(collector.moments[collector.group[1]], x)


def test_a_tied_site_adds_all_its_uses() -> None:
    collector, x, y = Collector(), batch(0), batch(1)
    for _ in range(2):
        collector.tap(site(0), x)
        collector.tap(site(0), y)
        collector.tap(site(1), x)
        collector.end_batch()
    agree(collector.moments[collector.group[0]], x, y, x, y)
    agree(collector.moments[collector.group[1]], x, x)


def test_random_traffic_is_summed_right() -> None:
    generator = np.random.default_rng(0)
    collector, seen = Collector(), {order: [] for order in range(5)}
    for number in range(12):
        inputs = [batch(100 * number + k) for k in range(3)]
        for order in range(5):
            for _ in range(generator.integers(0, 3)):
                x = inputs[generator.integers(0, 3)]
                collector.tap(site(order), x)
                seen[order].append(x)
        collector.end_batch()
    for order, activations in seen.items():
        agree(collector.moments[collector.group[order]], *activations)
