"""All modes reduced: the windows one tap shorter."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, random_factors, random_metric_of, random_weight_of, relative_error

D = decompositions.get("tucker")
WEIGHT = Metric("weight")
CASES = [("conv2d", "", {"s": 4, "r": 3}), ("conv2d-groups", "", {"s": 2, "r": 3})]


def metric_of(name: str, axes: dict[str, int]) -> Metric:
    return WEIGHT if name == "weight" else random_metric_of(axes)


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_weight_of_its_own_format_is_found_again(kind: str, variant: str, ranks: dict[str, int], metric: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    layout = D.layout(axes, ranks, variant)
    weight = rebuild(random_factors(layout, seed=1), layout)
    found = rebuild(D.fit(weight, layout, metric_of(metric, axes)), layout)
    assert relative_error(weight, found, WEIGHT, axes["g"]) < 1e-20


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


def test_the_windows_are_one_tap_shorter_and_images_only() -> None:
    assert D.layout(EXAMPLE_AXES["conv2d"], {"s": 4, "r": 3}, "").shapes["core"] == (4, 3, 2, 2)
    for kind in ("conv1d", "conv2d-row", "conv2d-pointwise", "conv3d"):
        assert D.variants(EXAMPLE_AXES[kind]) == ()
