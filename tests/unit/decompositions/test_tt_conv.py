"""Trains of convolutions: exact where the weight is one, and better in the metric than without it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, random_factors, random_metric_of, random_weight_of, relative_error

D = decompositions.get("tt_conv")
WEIGHT = Metric("weight")
CASES = [("conv2d", ""), ("conv2d-groups", ""), ("conv2d", "matricised")]
RANKS = {"": {"s": 3, "l": 4, "r": 2}, "matricised": {"r": 4}}


def metric_of(name: str, axes: dict[str, int]) -> Metric:
    return WEIGHT if name == "weight" else random_metric_of(axes)


@pytest.mark.parametrize(("kind", "variant"), CASES)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_weight_of_its_own_format_is_found_again(kind: str, variant: str, metric: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    layout = D.layout(axes, RANKS[variant], variant)
    weight = rebuild(random_factors(layout, seed=1), layout)
    found = rebuild(D.fit(weight, layout, metric_of(metric, axes)), layout)
    assert relative_error(weight, found, WEIGHT, axes["g"]) < 1e-20


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_the_fit_in_the_metric_is_better_there_than_that_of_the_weight(kind: str, variant: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    weight, norm, layout = random_weight_of(axes), random_metric_of(axes), D.layout(axes, RANKS[variant], variant)
    mine, other = (rebuild(D.fit(weight, layout, m), layout) for m in (norm, WEIGHT))
    errors = [relative_error(weight, found, norm, axes["g"]) for found in (mine, other)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_predictions_fall_with_the_ranks(kind: str, variant: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    lattice = D.rank_lattice(axes, 1, variant)
    stated = D.errors(random_weight_of(axes), axes, random_metric_of(axes), lattice, variant)
    assert len(stated) > 3
    assert all(later < error for error, later in pairwise(stated))


def test_channels_are_split_near_their_square_roots_and_only_without_groups() -> None:
    axes = {"g": 1, "o": 512, "i": 48, "p": 3, "q": 3}
    assert D.modes(axes, "matricised") == {"o1": 16, "o2": 32, "i1": 8, "i2": 6}
    assert D.variants(axes) == ("", "matricised")
    assert D.variants({**axes, "g": 2}) == D.variants({**axes, "o": 13}) == ("",)


def test_it_wants_two_window_axes_of_more_than_one_tap() -> None:
    for kind in ("conv1d", "conv2d-row", "conv2d-pointwise", "conv3d", "linear-tall"):
        assert D.variants(EXAMPLE_AXES[kind]) == ()


def test_split_channels_are_fitted_by_an_svd_in_the_weight_metric() -> None:
    axes = dict(EXAMPLE_AXES["conv2d"])
    weight, layout = random_weight_of(axes), D.layout(axes, {"r": 4}, "matricised")
    unfolded = weight.reshape(2, 4, 3, 2, 9).permute(4, 0, 2, 1, 3).reshape(54, 8)
    energy = torch.linalg.svdvals(unfolded).square()
    found = rebuild(D.fit(weight, layout, WEIGHT), layout)
    assert relative_error(weight, found, WEIGHT) == pytest.approx(float(energy[4:].sum() / energy.sum()), rel=1e-9)
