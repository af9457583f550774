"""The optimum in the metric (Eckart and Young), against an SVD of the weight whitened by Cholesky."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc import decompositions
from tdc.decompositions import low_rank, rebuild
from tdc.ir import Metric
from tdc.testing import assert_close, optimal_error, random_metric, random_weight, relative_error, variants_of

LOW_RANK = ("pivoted", "svd")
AXES = {"o": 12, "i": 8}
CASES = [(name, variant) for name in LOW_RANK for variant in variants_of(name, AXES)]
SHAPES = [(12, 8), (7, 13), (30, 5)]


def fitted(name: str, variant: str, weight: torch.Tensor, rank: int, metric: Metric) -> torch.Tensor:
    d = decompositions.get(name)
    layout = d.layout({"o": weight.shape[0], "i": weight.shape[1]}, {"r": rank}, variant)
    return rebuild(d.fit(weight, layout, metric), layout)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_data", [False, True])
def test_the_optimum_in_the_metric_is_attained(
    name: str, variant: str, shape: tuple[int, int], with_data: bool
) -> None:
    weight, metric = random_weight(*shape), random_metric(shape[1]) if with_data else Metric("weight")
    for rank in range(1, min(shape)):
        best = optimal_error(weight, metric, rank)
        assert relative_error(weight, fitted(name, variant, weight, rank, metric), metric) == pytest.approx(
            best, rel=1e-10
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_the_symmetric_root_and_cholesky_give(shape: tuple[int, int]) -> None:
    """The three published forms: without an inverse, ``(W S^1/2)_r S^-1/2`` and ``(W L)_r L^-1`` with ``S = L L^T``."""
    weight, metric = random_weight(*shape), random_metric(shape[1])
    assert metric.second_moment is not None
    values, vectors = torch.linalg.eigh(metric.second_moment)
    roots = ((vectors * values.sqrt()) @ vectors.T, torch.linalg.cholesky(metric.second_moment))
    for rank in range(1, min(shape)):
        found = fitted("svd", variants_of("svd", AXES)[0], weight, rank, metric)
        for root in roots:
            left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
            form = torch.linalg.solve(root, (left[:, :rank] * singular[:rank]) @ right[:rank], left=False)
            assert float((found - form).norm() / form.norm()) < 1e-9


@settings(max_examples=30)
@given(rows=st.integers(2, 15), columns=st.integers(2, 15), seed=st.integers(0, 99))
def test_the_tail_is_the_error_of_every_rank(rows: int, columns: int, seed: int) -> None:
    weight, metric = random_weight(rows, columns, seed=seed), random_metric(columns, seed=seed)
    best = low_rank(weight, metric)
    assert best.tail.shape == (min(rows, columns) + 1,)
    assert best.tail[0] == pytest.approx(1)
    assert best.tail[-1] == 0
    for rank in range(min(rows, columns)):
        assert float(best.tail[rank]) == pytest.approx(optimal_error(weight, metric, rank), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_orthonormal_and_the_coordinates_are_its_products(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    best = low_rank(weight, random_metric(shape[1]))
    assert_close(best.basis[0].T @ best.basis[0], torch.eye(min(shape), dtype=torch.float64), 1e-12)
    assert_close(best.coordinates[0], best.basis[0].T @ weight, 1e-12)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("seen", [1, 3, 7])
def test_a_singular_second_moment_attains_the_optimum(name: str, variant: str, seen: int) -> None:
    weight, metric = random_weight(12, 8), random_metric(8, rank=seen)
    for rank in range(1, 8):
        best = optimal_error(weight, metric, rank)
        error = relative_error(weight, fitted(name, variant, weight, rank, metric), metric)
        assert error == pytest.approx(best, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_directions_that_the_data_never_took_are_projected_and_not_zeroed(name: str, variant: str) -> None:
    """The fit is ``P W`` with a projection P, so unseen inputs keep all of W that P keeps."""
    weight, metric = random_weight(12, 8), random_metric(8, rank=3)
    assert metric.second_moment is not None
    unseen = torch.linalg.eigh(metric.second_moment).eigenvectors[:, :5]
    found = fitted(name, variant, weight, 3, metric)
    basis = torch.linalg.qr(found).Q[:, :3]
    assert_close(found @ unseen, basis @ (basis.T @ (weight @ unseen)), 1e-10)
    assert float((found @ unseen).norm()) > 0.05 * float((weight @ unseen).norm())


def test_pivoted_and_svd_are_one_approximation() -> None:
    weight, metric = random_weight(12, 8), random_metric(8)
    expected = fitted("svd", "", weight, 3, metric)
    for variant in variants_of("pivoted", AXES):
        assert_close(fitted("pivoted", variant, weight, 3, metric), expected, 1e-12)


def test_the_scale_of_the_second_moment_does_not_count() -> None:
    weight, metric = random_weight(12, 8), random_metric(8)
    assert metric.second_moment is not None
    scaled = Metric("input", metric.second_moment * 2.0**40)
    assert torch.equal(low_rank(weight, metric).basis, low_rank(weight, scaled).basis)


def test_a_weight_that_was_changed_in_place_is_seen() -> None:
    weight = random_weight(12, 8)
    before = low_rank(weight, Metric("weight"))
    weight.mul_(2)
    assert_close(low_rank(weight, Metric("weight")).coordinates, 2 * before.coordinates, 1e-12)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_pivots_keep_the_coefficients_small(shape: tuple[int, int]) -> None:
    """Column pivoting bounds them by far less than the theoretical 2^r: ten is already unusual."""
    weight = torch.randn(*shape, dtype=torch.float64)
    d = decompositions.get("pivoted")
    for variant in variants_of("pivoted", AXES):
        layout = d.layout({"o": shape[0], "i": shape[1]}, {"r": 8}, variant)
        factors = d.fit(weight, layout, Metric("weight"))
        assert float(factors["coef"].abs().max()) < 10


@pytest.mark.parametrize("axes", [{"o": 12, "i": 8}, {"o": 4, "i": 8}, {"o": 4, "i": 9}])
def test_pivoted_stores_less_than_svd_at_every_rank(axes: dict[str, int]) -> None:
    pivoted, svd = decompositions.get("pivoted"), decompositions.get("svd")
    for rank in range(1, min(axes.values())):
        for variant in variants_of("pivoted", axes):
            stored = svd.layout(axes, {"r": rank}, "").params - rank**2
            assert pivoted.layout(axes, {"r": rank}, variant).params == stored


def test_pivoted_at_full_rank_stores_what_dense_stores() -> None:
    for variant in ("input", "output"):
        axes = {"o": 8, "i": 12} if variant == "input" else {"o": 12, "i": 8}
        assert decompositions.get("pivoted").layout(axes, {"r": 8}, variant).params == 96


@pytest.mark.parametrize(("axes", "variant"), [({"o": 5, "i": 10}, "input"), ({"o": 4, "i": 9}, "output")])
def test_pivoted_takes_the_side_that_moves_fewer_numbers(axes: dict[str, int], variant: str) -> None:
    """i + r at the input, 2 o at the output."""
    assert decompositions.get("pivoted").variants(axes) == (variant,)


def test_groups_are_fitted_each_for_itself_and_their_errors_add_up() -> None:
    weight, metric = torch.cat([random_weight(6, 10), 3 * random_weight(6, 10, seed=1)]), random_metric(10, groups=2)
    both = low_rank(weight, metric, 2)
    assert metric.second_moment is not None
    for g, part in enumerate(weight.split(6)):
        one = low_rank(part, Metric("input", metric.second_moment[g]))
        assert_close(both.approximation(2)[g], one.approximation(2)[0], 1e-10)
    for rank in range(7):
        assert float(both.tail[rank]) == pytest.approx(optimal_error(weight, metric, rank, 2), rel=1e-9, abs=1e-15)


def test_the_moment_of_the_outputs_serves_as_well_as_that_of_the_inputs() -> None:
    weight, metric = random_weight(12, 30), random_metric(30)
    assert metric.second_moment is not None
    outputs = Metric("input", output_moment=(weight @ metric.second_moment @ weight.T)[None])
    mine, other = low_rank(weight, metric), low_rank(weight, outputs)
    assert_close(other.tail, mine.tail, 1e-9)
    assert_close(other.approximation(4), mine.approximation(4), 1e-8)


def test_what_a_bias_takes_up_counts_in_the_whole_and_not_in_the_error() -> None:
    weight, metric = random_weight(12, 8), random_metric(8, centred=True)
    assert metric.second_moment is not None
    assert metric.mean is not None
    spread, mean = (
        float(torch.trace(weight @ metric.second_moment @ weight.T)),
        float((weight @ metric.mean).square().sum()),
    )
    plain, centred = low_rank(weight, Metric("input", metric.second_moment)), low_rank(weight, metric)
    assert_close(centred.tail, plain.tail * spread / (spread + mean), 1e-12)
