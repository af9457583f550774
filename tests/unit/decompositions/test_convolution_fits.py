"""Decompositions of convolutions against closed forms: in the weight metric by an SVD of the right unfolding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import bias_shift, energy, rebuild
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, optimal_error, random_metric_of, random_weight_of, relative_error

KINDS = ("conv1d", "conv2d", "conv2d-groups", "conv2d-row", "conv2d-narrowing", "conv2d-widening", "conv3d")
WEIGHT = Metric("weight")


def unfolded(name: str, weight: Tensor, axes: dict[str, int]) -> Tensor:
    """Each group as the matrix that the decomposition reduces: along i; or (i p) against the rest."""
    grouped = weight.reshape(axes["g"], axes["o"], *weight.shape[1:])
    inner = (2, 3) if name == "spatial_svd" else (2,)
    return grouped.movedim(inner, tuple(range(1, 1 + len(inner)))).flatten(1, len(inner)).flatten(2).flatten(0, 1)


CLOSED = [
    (name, kind)
    for name in ("input_svd", "spatial_svd")
    for kind in KINDS
    if decompositions.get(name).variants(EXAMPLE_AXES[kind])
]


@pytest.mark.parametrize(("name", "kind"), CLOSED)
def test_in_the_weight_metric_the_fit_is_the_optimum_of_its_unfolding(name: str, kind: str) -> None:
    d, axes = decompositions.get(name), dict(EXAMPLE_AXES[kind])
    weight, (variant,) = random_weight_of(axes), d.variants(axes)
    lattice = [{"r": rank} for rank in range(1, d.full_ranks(axes, variant)["r"])]
    stated = d.errors(weight, axes, WEIGHT, lattice, variant)
    for ranks, error in zip(lattice, stated, strict=True):
        best = optimal_error(unfolded(name, weight, axes), WEIGHT, ranks["r"], axes["g"])
        layout = d.layout(axes, ranks, variant)
        found = rebuild(d.fit(weight, layout, WEIGHT), layout)
        assert error == pytest.approx(best, rel=1e-9, abs=1e-14)
        assert relative_error(weight, found, WEIGHT, axes["g"]) == pytest.approx(best, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_the_narrower_convolution_is_the_optimum_in_every_metric(kind: str, centred: bool) -> None:
    d, axes = decompositions.get("output_svd"), EXAMPLE_AXES[kind]
    weight, metric = random_weight_of(axes), random_metric_of(axes, centred=centred)
    for rank in range(1, d.full_ranks(axes, "")["r"]):
        layout = d.layout(axes, {"r": rank}, "")
        found = rebuild(d.fit(weight, layout, metric), layout)
        best = optimal_error(weight, metric, rank, axes["g"])
        assert relative_error(weight, found, metric, axes["g"]) == pytest.approx(best, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["input_svd", "spatial_svd", "tucker2", "pivoted"])
def test_the_fit_in_the_input_metric_is_better_there_than_that_in_the_weight_metric(name: str, kind: str) -> None:
    d, axes, metric = decompositions.get(name), EXAMPLE_AXES[kind], random_metric_of(EXAMPLE_AXES[kind])
    weight, groups = random_weight_of(axes), axes["g"]
    for variant in d.variants(axes):
        ranks = {axis: max(1, full // 2) for axis, full in d.full_ranks(axes, variant).items()}
        layout = d.layout(axes, ranks, variant)
        mine, other = (rebuild(d.fit(weight, layout, m), layout) for m in (metric, WEIGHT))
        assert relative_error(weight, mine, metric, groups) <= relative_error(weight, other, metric, groups) * (
            1 + 1e-9
        )
        assert relative_error(weight, other, WEIGHT, groups) <= relative_error(weight, mine, WEIGHT, groups) * (
            1 + 1e-9
        )


def test_tucker2_with_all_inputs_is_the_narrower_convolution_and_with_all_outputs_the_fewer_inputs() -> None:
    axes = EXAMPLE_AXES["conv2d"]
    weight, metric, d = random_weight_of(axes), random_metric_of(axes), decompositions.get("tucker2")
    layout = d.layout(axes, {"s": 3, "r": 6}, "")
    found = rebuild(d.fit(weight, layout, metric), layout)
    assert relative_error(weight, found, metric) == pytest.approx(optimal_error(weight, metric, 3), rel=1e-6)
    layout = d.layout(axes, {"s": 8, "r": 3}, "")
    best = optimal_error(unfolded("input_svd", weight, dict(axes)), WEIGHT, 3)
    found = rebuild(d.fit(weight, layout, WEIGHT), layout)
    assert relative_error(weight, found, WEIGHT) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "other"), [("channels_out", "output_svd"), ("channels_in", "input_svd"), ("channels", "tucker2")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_pivoted_writes_the_same_approximation_in_fewer_numbers(variant: str, other: str, kind: str) -> None:
    axes, metric = EXAMPLE_AXES[kind], random_metric_of(EXAMPLE_AXES[kind])
    weight, d, plain = random_weight_of(axes), decompositions.get("pivoted"), decompositions.get(other)
    ranks = dict.fromkeys(d.full_ranks(axes, variant), 2)
    layouts = d.layout(axes, ranks, variant), plain.layout(axes, ranks, "")
    mine, same = (rebuild(p.fit(weight, layout, metric), layout) for p, layout in zip((d, plain), layouts, strict=True))
    assert float((mine - same).norm() / same.norm()) < 1e-9
    assert layouts[1].params - layouts[0].params == axes["g"] * 4 * len(ranks)


def test_spatial_svd_wants_two_window_axes_of_more_than_one_tap() -> None:
    d = decompositions.get("spatial_svd")
    assert {kind: d.variants(axes) for kind, axes in EXAMPLE_AXES.items() if d.variants(axes)} == {
        "conv2d": ("",),
        "conv2d-groups": ("",),
        "conv2d-narrowing": ("",),
        "conv2d-widening": ("",),
        "conv2d-depthwise": ("",),
        "conv3d": ("volume",),
    }


def test_what_the_bias_must_take_up_is_the_mean_of_the_lost_output() -> None:
    axes = EXAMPLE_AXES["conv2d-groups"]
    metric, difference = random_metric_of(axes, centred=True), random_weight_of(axes)
    assert metric.mean is not None
    expected = np.einsum("gon,gn->go", difference.reshape(2, 4, 45).numpy(), metric.mean.numpy()).flatten()
    shift = bias_shift(difference, metric)
    assert shift is not None
    np.testing.assert_allclose(shift.numpy(), expected, rtol=1e-12)
    assert bias_shift(difference, random_metric_of(axes)) is None


def test_the_whole_of_a_relative_error_is_the_mean_square_of_the_output() -> None:
    axes = EXAMPLE_AXES["conv2d-groups"]
    weight, patches = random_weight_of(axes), torch.randn(500, 2, 45, dtype=torch.float64) + 0.3
    mean = patches.mean(0)
    spread = torch.einsum("mgn,mgk->gnk", patches - mean, patches - mean) / 500
    outputs = torch.einsum("mgn,gon->mgo", patches, weight.reshape(2, 4, 45))
    whole = energy(weight.reshape(2, 4, 45), Metric("input", spread, mean))
    assert whole == pytest.approx(float(outputs.square().sum()) / 500, rel=1e-12)
