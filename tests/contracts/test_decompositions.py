"""Laws that every decomposition keeps, in every variant and for every kind of weight, whatever its name. A new file is
tested on arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, pairwise
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import Decomposition, rebuild
from tdc.ir import Metric
from tdc.testing import (
    EXAMPLE_AXES,
    assert_close,
    matrix_of,
    optimal_error,
    random_metric_of,
    random_weight_of,
    relative_error,
    variants_of,
)

Axes = Mapping[str, int]
METRICS = ("weight", "input", "centred", "singular")


CASES = [
    (n, v, kind) for n in decompositions.names() for kind, axes in EXAMPLE_AXES.items() for v in variants_of(n, axes)
]
SMALL = ("linear-tall", "conv1d", "conv2d-groups", "conv2d-pointwise", "conv2d-narrowing", "conv3d")
FEW = [case for case in CASES if case[2] in SMALL]
SIDES = st.integers(2, 13)

EXACT = [case for case in CASES if decompositions.get(case[0]).exact_at_full_rank]
KNOWN = [case for case in CASES if not decompositions.get(case[0]).estimates]


def marked(cases: list[Any]) -> list[Any]:
    """Names, or tuples that begin with one: the laws on formats that are fitted by iterations take minutes."""
    values = [(case,) if isinstance(case, str) else case for case in cases]
    slow = [decompositions.get(name).estimates for name, *_ in values]
    return [pytest.param(*v, marks=[pytest.mark.slow] if s else []) for v, s in zip(values, slow, strict=True)]


each_case = pytest.mark.parametrize(("name", "variant", "kind"), marked(CASES))
each_small_case = pytest.mark.parametrize(("name", "variant", "kind"), marked(FEW))
each_exact_case = pytest.mark.parametrize(("name", "variant", "kind"), marked(EXACT))
each_known_case = pytest.mark.parametrize(("name", "variant", "kind"), marked(KNOWN))
each_known_name = pytest.mark.parametrize("name", sorted({name for name, *_ in KNOWN}))
each_exact_name = pytest.mark.parametrize("name", marked(sorted({name for name, *_ in EXACT})))
each_metric = pytest.mark.parametrize("metric", METRICS)
each_name = pytest.mark.parametrize("name", decompositions.names())
each_fitted_name = pytest.mark.parametrize("name", marked(decompositions.names()))


@st.composite
def some_axes(draw: st.DrawFn, sides: st.SearchStrategy[int] = SIDES) -> Axes:
    """Axes of a linear weight, or of a convolution with small windows."""
    windows = draw(st.integers(0, 3))
    axes = {"o": draw(sides), "i": draw(sides)}
    if windows:
        taps = {axis: draw(st.integers(1, 3)) for axis in ("p", "q", "z")[:windows]}
        axes = {"g": draw(st.integers(1, 2)), "o": min(axes["o"], 7), "i": min(axes["i"], 7), **taps}
    return axes


def metric_of(metric: str, axes: Axes, seed: int = 0) -> Metric:
    """The metrics of the laws; the singular one has seen one direction less than there are."""
    width = prod(size for axis, size in axes.items() if axis not in ("g", "o"))
    known = {
        "weight": lambda: Metric("weight"),
        "input": lambda: random_metric_of(axes, seed=seed),
        "centred": lambda: random_metric_of(axes, seed=seed, centred=True),
        "singular": lambda: random_metric_of(axes, seed=seed, rank=max(1, width - 1)),
    }
    return known[metric]()


def approximation(
    d: Decomposition, weight: Tensor, axes: Axes, variant: str, ranks: Mapping[str, int], metric: Metric
) -> Tensor:
    layout = d.layout(axes, ranks, variant)
    return rebuild(d.fit(weight, layout, metric), layout)


def points(d: Decomposition, axes: Axes, variant: str, most: int = 12) -> list[dict[str, int]]:
    """The lattice, of a long one some points from end to end, and fewer where every one takes iterations."""
    most = min(most, 2) if d.estimates else most
    lattice = [dict(ranks) for ranks in d.rank_lattice(axes, 1, variant)]
    if len(lattice) <= most:
        return lattice
    return [lattice[k * (len(lattice) - 1) // (most - 1)] for k in range(most)]


@each_name
def test_a_decomposition_states_name_and_summary_and_takes_some_kind(name: str) -> None:
    d = decompositions.get(name)
    assert d.name == name
    assert d.summary.strip()
    for axes in EXAMPLE_AXES.values():
        assert set(variants_of(name, axes)) <= set(d.equations)
        for variant in variants_of(name, axes):
            output = d.rebuild(axes, variant).output
            if d.modes(axes, variant):
                assert len(output.groups) == len(axes) - ("g" in axes)
            else:
                assert str(output) == ("o i" if "g" not in axes else f"(g o) {' '.join([*axes][2:])}")
            layout = d.layout(axes, d.full_ranks(axes, variant), variant)
            assert "x" not in layout.rebuild.names, "the activation of blocks has this name"
            assert "b" not in layout.axes, "so has the axis of the examples"
    assert any(variants_of(name, axes) for axes in EXAMPLE_AXES.values()) != d.between_layers
    large = ({"o": 512, "i": 512}, {"g": 1, "o": 64, "i": 64, "p": 3, "q": 3})
    every = {v for axes in (*EXAMPLE_AXES.values(), *large) for v in variants_of(name, axes)}
    assert every == (set() if d.between_layers else set(d.equations))


@each_case
def test_factors_have_the_shapes_of_the_layout_and_are_float64(name: str, variant: str, kind: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight = random_weight_of(axes)
    for ranks in (*points(d, axes, variant), d.full_ranks(axes, variant)):
        layout = d.layout(axes, ranks, variant)
        factors = d.fit(weight, layout, Metric("weight"))
        assert {key: tuple(f.shape) for key, f in factors.items()} == layout.shapes
        assert all(f.is_contiguous() for f in factors.values())
        index = set(layout.rebuild.indices)
        assert {f.dtype for key, f in factors.items() if key not in index} == {torch.float64}
        assert {factors[key].dtype for key in index} <= {torch.int32}


@each_exact_case
@each_metric
def test_full_rank_is_exact(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, full = random_weight_of(axes), d.full_ranks(axes, variant)
    assert_close(approximation(d, weight, axes, variant, full, metric_of(metric, axes)), weight, 1e-12)


@each_exact_case
def test_full_rank_is_exact_when_stored_in_float32(name: str, variant: str, kind: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight = random_weight_of(axes)
    layout = d.layout(axes, d.full_ranks(axes, variant), variant)
    factors = d.fit(weight, layout, metric_of("input", axes))
    stored = {key: f.float() if f.is_floating_point() else f for key, f in factors.items()}
    assert_close(rebuild(stored, layout), weight, 1e-5)


@each_case
@each_metric
def test_a_fit_is_as_good_as_stated(name: str, variant: str, kind: str, metric: str) -> None:
    """The very error where the outputs alone are projected: there the optimum is known. Else at most that, or of an
    estimate a quarter more.
    """
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, norm, lattice = random_weight_of(axes), metric_of(metric, axes), points(d, axes, variant)
    for ranks, stated in zip(lattice, d.errors(weight, axes, norm, lattice, variant), strict=True):
        found = approximation(d, weight, axes, variant, ranks, norm)
        measured = relative_error(weight, found, norm, axes.get("g", 1))
        assert measured <= stated * (1.25 if d.estimates else 1 + 1e-6) + 1e-15
        if not d.needs_input(variant):
            assert measured == pytest.approx(stated, rel=1e-9, abs=1e-15)


@each_small_case
@each_metric
def test_no_fit_beats_the_optimum_of_its_own_matrix_rank(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, norm, groups = random_weight_of(axes), metric_of(metric, axes), axes.get("g", 1)
    for ranks in points(d, axes, variant):
        found = approximation(d, weight, axes, variant, ranks, norm)
        own = [int(torch.linalg.matrix_rank(torch.from_numpy(part), rtol=1e-10)) for part in matrix_of(found, groups)]
        best = optimal_error(weight, norm, own, groups)
        assert relative_error(weight, found, norm, groups) >= best * (1 - 1e-10) - 1e-15


@each_known_name
@settings(max_examples=20)
@given(axes=some_axes(), seed=st.integers(0, 99), metric=st.sampled_from(METRICS))
def test_error_falls_along_every_rank_of_the_lattice(name: str, axes: Axes, seed: int, metric: str) -> None:
    d, weight = decompositions.get(name), random_weight_of(axes, seed=seed)
    for variant in variants_of(name, axes):
        lattice = [dict(ranks) for ranks in d.rank_lattice(axes, 1, variant)]
        errors = d.errors(weight, axes, metric_of(metric, axes, seed), lattice, variant)
        assert all(0 <= error <= 1 for error in errors)
        for axis in d.full_ranks(axes, variant):
            others = [(tuple(r for a, r in ranks.items() if a != axis), ranks[axis]) for ranks in lattice]
            ordered = sorted(zip(others, errors, strict=True))
            for _, line in groupby(ordered, key=lambda entry: entry[0][0]):
                assert all(later <= error for (_, error), (_, later) in pairwise(line))


@pytest.mark.parametrize(("name", "variant", "kind"), marked([case for case in FEW if case not in KNOWN]))
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_estimates_fall_with_the_stored_numbers(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    lattice = sorted(points(d, axes, variant), key=lambda ranks: d.layout(axes, ranks, variant).params)
    errors = d.errors(random_weight_of(axes), axes, metric_of(metric, axes), lattice, variant)
    assert all(0 <= later <= error <= 1 for error, later in pairwise(errors))


@each_name
@settings(max_examples=60)
@given(axes=some_axes(st.integers(1, 300)), multiple=st.integers(1, 16))
def test_every_lattice_point_is_a_multiple_and_stores_less_than_dense(name: str, axes: Axes, multiple: int) -> None:
    d, dense = decompositions.get(name), prod(axes.values())
    for variant in variants_of(name, axes):
        lattice, full = d.rank_lattice(axes, multiple, variant), d.full_ranks(axes, variant)
        assert len({tuple(sorted(ranks.items())) for ranks in lattice}) == len(lattice)
        for ranks in lattice:
            assert set(ranks) == set(full)
            assert all(rank % multiple == 0 and 0 < rank <= full[axis] for axis, rank in ranks.items())
            assert d.layout(axes, ranks, variant).params < dense


@each_exact_name
@settings(max_examples=20)
@given(axes=some_axes(), seed=st.integers(0, 99), metric=st.sampled_from(METRICS))
def test_every_shape_is_exact_at_full_rank(name: str, axes: Axes, seed: int, metric: str) -> None:
    d, weight = decompositions.get(name), random_weight_of(axes, seed=seed)
    for variant in variants_of(name, axes):
        full = d.full_ranks(axes, variant)
        found = approximation(d, weight, axes, variant, full, metric_of(metric, axes, seed))
        assert_close(found, weight, 1e-12)


@each_small_case
@each_metric
def test_the_same_input_gives_the_same_bits(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes, norm = decompositions.get(name), EXAMPLE_AXES[kind], metric_of(metric, EXAMPLE_AXES[kind])
    for ranks in points(d, axes, variant):
        layout = d.layout(axes, ranks, variant)
        first = d.fit(random_weight_of(axes), layout, norm)
        d.errors(random_weight_of(axes, seed=1), axes, norm, [ranks], variant)
        second = d.fit(random_weight_of(axes), layout, norm)
        assert all(torch.equal(first[key], second[key]) for key in first)


@each_small_case
@each_metric
def test_fitting_leaves_its_inputs_alone(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, norm, same = random_weight_of(axes), metric_of(metric, axes), metric_of(metric, axes)
    lattice = points(d, axes, variant, 2)
    d.errors(weight, axes, norm, lattice, variant)
    for ranks in (*lattice, d.full_ranks(axes, variant)):
        approximation(d, weight, axes, variant, ranks, norm)
    assert torch.equal(weight, random_weight_of(axes))
    for mine, other in ((norm.second_moment, same.second_moment), (norm.mean, same.mean)):
        assert mine is other is None or (mine is not None and other is not None and torch.equal(mine, other))


@each_case
def test_impossible_ranks_are_refused(name: str, variant: str, kind: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    full = d.full_ranks(axes, variant)
    wrong = [{**full, "zz": 1}, {}]
    wrong += [{**full, axis: rank} for axis in full for rank in (0, -1, full[axis] + 1)]
    for ranks in wrong:
        with pytest.raises(ValueError, match=name):
            d.layout(axes, ranks, variant)
    with pytest.raises(ValueError, match="no variant 'zz'"):
        d.layout(axes, full, "zz")


@each_name
def test_a_variant_for_another_kind_is_refused(name: str) -> None:
    d = decompositions.get(name)
    for axes in ({"o": 8, "i": 8}, {"g": 1, "o": 8, "i": 8, "p": 1}, {"g": 1, "o": 8, "i": 8, "p": 2, "q": 2}):
        written = [v for v, text in d.equations.items() if text.startswith("(g ") == ("g" in axes)]
        for variant in set(d.equations) - set(written):
            with pytest.raises(ValueError, match=f"{name} has no variant '{variant}'"):
                d.layout(axes, {"r": 1}, variant)


@each_small_case
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e120, 1e-120])
def test_extreme_scales_lose_nothing(name: str, variant: str, kind: str, scale: float) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, full, lattice = random_weight_of(axes), d.full_ranks(axes, variant), points(d, axes, variant)
    for metric in ("weight", "input"):
        norm = metric_of(metric, axes)
        if d.exact_at_full_rank:
            found = approximation(d, weight * scale, axes, variant, full, norm)
            assert_close(found, weight * scale, 1e-12)
        plain = d.errors(weight, axes, norm, lattice, variant)
        assert d.errors(weight * scale, axes, norm, lattice, variant) == pytest.approx(
            plain, rel=0.5 if d.estimates else 1e-9
        )


@each_small_case
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_second_moment_does_not_count(name: str, variant: str, kind: str, scale: float) -> None:
    d, axes, norm = decompositions.get(name), EXAMPLE_AXES[kind], random_metric_of(EXAMPLE_AXES[kind])
    assert norm.second_moment is not None
    other, weight = Metric("input", norm.second_moment * scale), random_weight_of(axes)
    lattice = points(d, axes, variant)
    plain = d.errors(weight, axes, norm, lattice, variant)
    assert d.errors(weight, axes, other, lattice, variant) == pytest.approx(
        plain, rel=0.5 if d.estimates else 1e-7, abs=1e-13
    )


@each_case
@each_metric
def test_a_zero_weight_stays_zero_at_every_rank(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    weight, norm, lattice = (
        torch.zeros_like(random_weight_of(axes)),
        metric_of(metric, axes),
        points(d, axes, variant),
    )
    for ranks in lattice:
        assert torch.equal(approximation(d, weight, axes, variant, ranks, norm), weight)
    assert set(d.errors(weight, axes, norm, lattice, variant)) <= {0.0}


@each_known_case
@each_metric
def test_a_weight_of_rank_one_is_exact_at_every_rank(name: str, variant: str, kind: str, metric: str) -> None:
    d, axes, norm = decompositions.get(name), EXAMPLE_AXES[kind], metric_of(metric, EXAMPLE_AXES[kind])
    weight = random_weight_of(axes, rank=1)
    for ranks in points(d, axes, variant):
        assert_close(approximation(d, weight, axes, variant, ranks, norm), weight, 1e-12)


@each_fitted_name
@pytest.mark.parametrize("sizes", [(2, 31), (31, 2), (3, 29), (13, 13)])
@pytest.mark.parametrize("taps", [{}, {"p": 2}, {"p": 2, "q": 3}])
def test_thin_and_prime_shapes_are_fitted_at_every_rank(name: str, sizes: tuple[int, int], taps: Axes) -> None:
    d, axes = decompositions.get(name), {**({"g": 1} if taps else {}), "o": sizes[0], "i": sizes[1], **taps}
    weight = random_weight_of(axes)
    for variant in variants_of(name, axes):
        for ranks in points(d, axes, variant, 6):
            found = approximation(d, weight, axes, variant, ranks, Metric("weight"))
            assert relative_error(weight, found, Metric("weight")) <= 1
            assert torch.isfinite(found).all()
