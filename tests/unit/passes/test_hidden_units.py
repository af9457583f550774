"""Which hidden units go, and what is lost by that."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tdc.ir import Hidden, Metric
from tdc.passes._hidden import eliminated, narrowed, widened


def problem(outputs: int, units: int, seed: int = 0, *, gradient: bool = True) -> tuple[Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> Tensor:
        rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        mixed = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64)
        return mixed.T @ mixed / len(rows)

    weight = torch.randn(outputs, units, generator=generator, dtype=torch.float64)
    return weight, Metric(
        "fisher" if gradient else "input", moment(units), gradient=moment(outputs) if gradient else None
    )


def lost(weight: Tensor, other: Tensor, metric: Metric) -> float:
    gradient = torch.eye(len(weight), dtype=weight.dtype) if metric.gradient is None else metric.gradient
    moment = metric.second_moment
    assert moment is not None

    def size(matrix: Tensor) -> float:
        return float((gradient @ matrix @ moment * matrix).sum())

    return size(weight - other) / size(weight)


def without(weight: Tensor, metric: Metric, kept: Tensor) -> Tensor:
    around = Hidden(1, "i", len(kept))
    small, own = narrowed(around, kept, weight, metric)
    assert small.shape == (len(weight), len(kept))
    assert own.second_moment is not None
    assert own.second_moment.shape == (len(kept), len(kept))
    return widened(around, kept, small, weight)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_errors_are_those_of_the_smaller_weights(gradient: bool) -> None:
    weight, metric = problem(10, 50, gradient=gradient)
    found = eliminated(weight, metric, 8, 8)
    assert list(found.errors) == [48, 40, 32, 24, 16, 8]
    assert sorted(found.order.tolist()) == list(range(50))
    for width, error in found.errors.items():
        kept = found.kept(width)
        assert error == pytest.approx(lost(weight, without(weight, metric, kept), metric), rel=0.02)


@pytest.mark.parametrize("width", [1, 7, 33, 49, 50])
def test_any_number_can_be_kept(width: int) -> None:
    """A plan may have been edited, or made for a machine with other steps."""
    weight, metric = problem(10, 50)
    found = eliminated(weight, metric, 8, width)
    kept = found.kept(width)
    assert len(set(kept.tolist())) == width
    if width < 50:
        assert min(found.errors) == width
        assert found.errors[width] == pytest.approx(lost(weight, without(weight, metric, kept), metric), rel=0.02)


def test_one_at_a_time_is_near_the_best_choice() -> None:
    ratios = []
    for seed in range(8):
        weight, metric = problem(4, 9, seed)
        found = eliminated(weight, metric, 1, 5)
        best = min(
            lost(weight, without(weight, metric, torch.tensor(kept)), metric)
            for kept in itertools.combinations(range(9), 5)
        )
        ratios.append(found.errors[5] / best)
    assert min(ratios) > 1 - 1e-4
    assert sorted(ratios)[4] < 1.2


def test_units_that_are_silent_or_copies_go_first_and_cost_nothing() -> None:
    _, metric = problem(6, 24)
    assert metric.second_moment is not None
    twice = torch.cat([torch.eye(24, dtype=torch.float64), torch.eye(24, dtype=torch.float64)[:12]])
    silent = torch.nn.functional.pad(twice @ metric.second_moment @ twice.T, (0, 4, 0, 4))
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = eliminated(wide, Metric("input", silent), 8, 8)
    assert found.errors[24] < 1e-5 < found.errors[16]
    kept = set(found.order[16:].tolist())
    assert not kept & {36, 37, 38, 39}
    assert all(len(kept & {k, 24 + k}) == 1 for k in range(12))


def test_a_layer_that_gives_units_keeps_their_rows() -> None:
    weight, metric = problem(12, 5)
    kept = torch.tensor([1, 4, 7])
    small, own = narrowed(Hidden(1, "o", 3), kept, weight, metric)
    assert torch.equal(small, weight[kept])
    assert own.gradient is not None
    assert metric.gradient is not None
    assert torch.equal(own.gradient, metric.gradient[kept][:, kept])
    whole = widened(Hidden(1, "o", 3), kept, small + 1, weight)
    assert torch.equal(whole[kept], weight[kept] + 1)
    rest = [k for k in range(12) if k not in (1, 4, 7)]
    assert torch.equal(whole[rest], weight[rest])
