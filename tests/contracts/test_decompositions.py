"""Laws that every decomposition keeps, in every variant, whatever its name. A new file is tested on arrival."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import Decomposition, rebuild
from tdc.ir import Metric, OpKind
from tdc.testing import assert_close, optimal_error, random_metric, random_weight, relative_error

CASES = [(name, variant) for name in decompositions.names() for variant in decompositions.get(name).equations]
SHAPES = [(12, 8), (7, 13), (11, 2), (2, 9), (5, 5)]
SIDES = st.integers(2, 17)

each_case = pytest.mark.parametrize(("name", "variant"), CASES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def metrics(columns: int) -> dict[str, Metric]:
    """The metrics of the laws; the last has seen one direction less than there are."""
    singular = random_metric(columns, rank=columns - 1)
    return {"weight": Metric("weight"), "input": random_metric(columns), "singular": singular}


each_metric = pytest.mark.parametrize("metric", ["weight", "input", "singular"])


def axes_of(weight: Tensor) -> dict[str, int]:
    return {"o": weight.shape[0], "i": weight.shape[1]}


def approximation(d: Decomposition, weight: Tensor, variant: str, ranks: dict[str, int], metric: Metric) -> Tensor:
    layout = d.layout(axes_of(weight), ranks, variant)
    return rebuild(d.fit(weight, layout, metric), layout)


def points(d: Decomposition, weight: Tensor) -> list[dict[str, int]]:
    return [dict(ranks) for ranks in d.rank_lattice(axes_of(weight), 1)]


@pytest.mark.parametrize("name", decompositions.names())
def test_a_decomposition_states_name_summary_and_kinds(name: str) -> None:
    d = decompositions.get(name)
    assert d.name == name
    assert d.summary.strip()
    assert OpKind.LINEAR in d.kinds, "the laws below have random weights for linear sites only: add some for this kind"
    assert d.variant({"o": 12, "i": 8}) in d.equations


@each_case
@each_shape
def test_factors_have_the_shapes_of_the_layout_and_are_float64(name: str, variant: str, shape: tuple[int, int]) -> None:
    d, weight = decompositions.get(name), random_weight(*shape)
    for ranks in (*points(d, weight), d.full_ranks(axes_of(weight))):
        layout = d.layout(axes_of(weight), ranks, variant)
        factors = d.fit(weight, layout, Metric("weight"))
        assert {key: tuple(f.shape) for key, f in factors.items()} == layout.shapes
        real = {key: f.dtype for key, f in factors.items() if key != layout.rebuild.index}
        assert set(real.values()) == {torch.float64}
        if layout.rebuild.index:
            assert factors[layout.rebuild.index].dtype == torch.int32


@each_case
@each_shape
@each_metric
def test_full_rank_is_exact(name: str, variant: str, shape: tuple[int, int], metric: str) -> None:
    d, weight = decompositions.get(name), random_weight(*shape)
    full = d.full_ranks(axes_of(weight))
    assert_close(approximation(d, weight, variant, full, metrics(shape[1])[metric]), weight, 1e-12)


@each_case
@each_shape
def test_full_rank_is_exact_when_stored_in_float32(name: str, variant: str, shape: tuple[int, int]) -> None:
    d, weight = decompositions.get(name), random_weight(*shape)
    layout = d.layout(axes_of(weight), d.full_ranks(axes_of(weight)), variant)
    factors = d.fit(weight, layout, random_metric(shape[1]))
    stored = {key: f.float() if f.is_floating_point() else f for key, f in factors.items()}
    assert_close(rebuild(stored, layout), weight, 1e-5)


@each_case
@each_shape
@each_metric
def test_stated_errors_are_those_of_the_fitted_factors(
    name: str, variant: str, shape: tuple[int, int], metric: str
) -> None:
    d, weight, norm = decompositions.get(name), random_weight(*shape), metrics(shape[1])[metric]
    lattice = points(d, weight)
    for ranks, stated in zip(lattice, d.errors(weight, norm, lattice), strict=True):
        measured = relative_error(weight, approximation(d, weight, variant, ranks, norm), norm)
        assert measured == pytest.approx(stated, rel=1e-9, abs=1e-15)


@each_case
@each_shape
@each_metric
def test_no_fit_beats_the_optimum_of_its_own_matrix_rank(
    name: str, variant: str, shape: tuple[int, int], metric: str
) -> None:
    d, weight, norm = decompositions.get(name), random_weight(*shape), metrics(shape[1])[metric]
    for ranks in points(d, weight):
        found = approximation(d, weight, variant, ranks, norm)
        best = optimal_error(weight, norm, int(torch.linalg.matrix_rank(found, rtol=1e-10)))
        assert relative_error(weight, found, norm) >= best * (1 - 1e-10) - 1e-15


@pytest.mark.parametrize("name", decompositions.names())
@settings(max_examples=25)
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 99), with_data=st.booleans())
def test_error_falls_along_the_lattice(name: str, rows: int, columns: int, seed: int, with_data: bool) -> None:
    d, weight = decompositions.get(name), random_weight(rows, columns, seed=seed)
    metric = random_metric(columns, seed=seed) if with_data else Metric("weight")
    lattice = d.rank_lattice(axes_of(weight), 1)
    errors = d.errors(weight, metric, lattice)
    assert errors == sorted(errors, reverse=True)
    assert all(0 <= error <= 1 for error in errors)


@pytest.mark.parametrize("name", decompositions.names())
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), multiple=st.integers(1, 16))
def test_every_lattice_point_is_a_multiple_and_stores_less_than_dense(
    name: str, rows: int, columns: int, multiple: int
) -> None:
    d, axes = decompositions.get(name), {"o": rows, "i": columns}
    lattice = d.rank_lattice(axes, multiple)
    assert len({tuple(sorted(ranks.items())) for ranks in lattice}) == len(lattice)
    for ranks in lattice:
        assert all(rank % multiple == 0 and rank > 0 for rank in ranks.values())
        for variant in d.equations:
            assert d.layout(axes, ranks, variant).params < rows * columns


@each_case
@settings(max_examples=25)
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 99))
def test_every_shape_is_exact_at_full_rank(name: str, variant: str, rows: int, columns: int, seed: int) -> None:
    d, weight = decompositions.get(name), random_weight(rows, columns, seed=seed)
    full = d.full_ranks(axes_of(weight))
    assert_close(approximation(d, weight, variant, full, Metric("weight")), weight, 1e-12)


@each_case
@each_metric
def test_the_same_input_gives_the_same_bits(name: str, variant: str, metric: str) -> None:
    d, norm = decompositions.get(name), metrics(8)[metric]
    for ranks in points(d, random_weight(12, 8)):
        layout = d.layout({"o": 12, "i": 8}, ranks, variant)
        first = d.fit(random_weight(12, 8), layout, norm)
        d.errors(random_weight(9, 8), norm, d.rank_lattice({"o": 9, "i": 8}, 1))
        second = d.fit(random_weight(12, 8), layout, norm)
        assert all(torch.equal(first[key], second[key]) for key in first)


@each_case
@each_metric
def test_fitting_leaves_its_inputs_alone(name: str, variant: str, metric: str) -> None:
    d, weight, norm = decompositions.get(name), random_weight(12, 8), metrics(8)[metric]
    approximation(d, weight, variant, points(d, weight)[0], norm)
    assert torch.equal(weight, random_weight(12, 8))
    if norm.second_moment is not None:
        assert torch.equal(norm.second_moment, metrics(8)[metric].second_moment)


@each_case
def test_impossible_ranks_are_refused(name: str, variant: str) -> None:
    d, axes = decompositions.get(name), {"o": 12, "i": 8}
    full = d.full_ranks(axes)
    axis = next(iter(full))
    wrong = [{**full, axis: 0}, {**full, axis: -1}, {**full, axis: full[axis] + 1}, {**full, "zz": 1}, {}]
    for ranks in wrong:
        with pytest.raises(ValueError, match=name):
            d.layout(axes, ranks, variant)
    with pytest.raises(ValueError, match="no variant 'zz'"):
        d.layout(axes, full, "zz")


@each_case
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e120, 1e-120])
def test_extreme_scales_lose_nothing(name: str, variant: str, scale: float) -> None:
    d, weight = decompositions.get(name), random_weight(12, 8) * scale
    full = d.full_ranks(axes_of(weight))
    assert_close(approximation(d, weight, variant, full, Metric("weight")), weight, 1e-12)
    lattice = points(d, weight)
    plain = d.errors(random_weight(12, 8), Metric("weight"), lattice)
    assert d.errors(weight, Metric("weight"), lattice) == pytest.approx(plain, rel=1e-9)


@each_case
@each_metric
@pytest.mark.parametrize("shape", [(12, 8), (7, 13)])
def test_a_zero_weight_stays_zero_at_every_rank(name: str, variant: str, metric: str, shape: tuple[int, int]) -> None:
    d, weight, norm = decompositions.get(name), torch.zeros(*shape, dtype=torch.float64), metrics(shape[1])[metric]
    for ranks in points(d, weight):
        assert torch.equal(approximation(d, weight, variant, ranks, norm), weight)
    assert set(d.errors(weight, norm, points(d, weight))) == {0.0}


@each_case
@each_metric
def test_a_weight_of_rank_one_is_exact_at_every_rank(name: str, variant: str, metric: str) -> None:
    d, weight, norm = decompositions.get(name), random_weight(12, 8, rank=1), metrics(8)[metric]
    for ranks in points(d, weight):
        assert_close(approximation(d, weight, variant, ranks, norm), weight, 1e-12)


@each_case
@pytest.mark.parametrize("shape", [(2, 31), (31, 2), (3, 29), (13, 13)])
def test_thin_and_prime_shapes_are_fitted_at_every_rank(name: str, variant: str, shape: tuple[int, int]) -> None:
    d, weight = decompositions.get(name), random_weight(*shape)
    for ranks in points(d, weight):
        found = approximation(d, weight, variant, ranks, Metric("weight"))
        assert relative_error(weight, found, Metric("weight")) <= 1
        assert torch.isfinite(found).all()
