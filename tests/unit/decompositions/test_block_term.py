"""Sums of Tucker-2 terms: a grouped convolution between two pointwise ones."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, random_factors, random_metric_of, random_weight_of, relative_error

D = decompositions.get("block_term")
WEIGHT = Metric("weight")
CASES = [
    ("conv1d", "2", {"s": 1, "r": 1}),
    ("conv2d", "2", {"s": 2, "r": 1}),
    ("conv2d-groups", "2", {"s": 1, "r": 1}),
    ("conv3d", "2", {"s": 1, "r": 1}),
]


def metric_of(name: str, axes: dict[str, int]) -> Metric:
    return WEIGHT if name == "weight" else random_metric_of(axes)


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_weight_of_its_own_format_is_found_again(kind: str, variant: str, ranks: dict[str, int], metric: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    layout = D.layout(axes, ranks, variant)
    weight = rebuild(random_factors(layout, seed=1), layout)
    found = rebuild(D.fit(weight, layout, metric_of(metric, axes)), layout)
    assert relative_error(weight, found, WEIGHT, axes["g"]) < 1e-6


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
def test_the_fit_in_the_metric_is_better_there_than_that_of_the_weight(
    kind: str, variant: str, ranks: dict[str, int]
) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    weight, norm, layout = random_weight_of(axes), random_metric_of(axes), D.layout(axes, ranks, variant)
    mine, other = (rebuild(D.fit(weight, layout, m), layout) for m in (norm, WEIGHT))
    errors = [relative_error(weight, found, norm, axes["g"]) for found in (mine, other)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
def test_predictions_fall_along_the_lattice(kind: str, variant: str, ranks: dict[str, int]) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    lattice = D.rank_lattice(axes, 1, variant)
    stated = D.errors(random_weight_of(axes), axes, random_metric_of(axes), lattice, variant)
    assert all(later <= error for error, later in pairwise(stated))
    assert stated[-1] < stated[0]


def test_one_block_less_than_the_channels_allow_is_declined() -> None:
    assert D.variants(EXAMPLE_AXES["conv2d"]) == ("2", "4")
    assert D.variants({"g": 1, "o": 16, "i": 8, "p": 3}) == ("2", "4", "8")
    assert D.variants(EXAMPLE_AXES["conv2d-pointwise"]) == ()


def test_blocks_share_no_channels_of_the_core() -> None:
    layout = D.layout(EXAMPLE_AXES["conv2d-groups"], {"s": 1, "r": 2}, "2")
    assert layout.shapes == {"u": (8, 2), "core": (4, 2, 3, 3), "v": (8, 5)}
