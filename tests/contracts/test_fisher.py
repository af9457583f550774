"""Laws of fits in the metric ``fisher``, for every format, whatever its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, assert_close, random_metric_of, random_weight_of, relative_error, variants_of

Axes = Mapping[str, int]
KINDS = ("linear-tall", "linear-composite", "conv1d", "conv2d-groups", "conv2d-pointwise", "conv3d")
CASES = [
    (n, v, kind)
    for n in decompositions.names()
    for kind in KINDS
    for v in variants_of(n, EXAMPLE_AXES[kind])
    if decompositions.get(n).rank_lattice(EXAMPLE_AXES[kind], 1, v)
]
PROJECTING = [c for c in CASES if not decompositions.get(c[0]).needs_input(c[1])]


Case = tuple[str, str, str]


def marked(cases: list[Case]) -> list[Any]:
    slow = [decompositions.get(name).estimates for name, *_ in cases]
    return [pytest.param(case, marks=[pytest.mark.slow] if s else []) for case, s in zip(cases, slow, strict=True)]


def layout_at(case: Case, place: float) -> Any:
    name, variant, kind = case
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    lattice = list(d.rank_lattice(axes, 1, variant))
    return d.layout(axes, lattice[round(place * (len(lattice) - 1))], variant)


def absorbing(case: Case) -> bool:
    name, variant, kind = case
    d, axes = decompositions.get(name), EXAMPLE_AXES[kind]
    return decompositions.absorbs(d.layout(axes, d.full_ranks(axes, variant), variant))


def fisher_of(axes: Axes, **options: Any) -> Metric:
    """Correlated gradients for every group, beside the moment of the input."""
    groups, outputs = axes.get("g", 1), axes["o"]
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(groups, 3 * outputs, outputs, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -1, outputs, dtype=torch.float64) @ torch.linalg.qr(rows[:, :outputs]).Q
    gradient = rows.mT @ rows / rows.shape[1]
    return replace(random_metric_of(axes, **options), name="fisher", gradient=gradient if "g" in axes else gradient[0])


def measured(weight: Tensor, found: Tensor, axes: Axes, metric: Metric) -> float:
    """``tr(G D S D^T)`` as the error of ``Q D`` in S, ``G = Q Q``: the symmetric root, where fits take Cholesky's."""
    assert metric.gradient is not None
    groups = axes.get("g", 1)
    values, vectors = torch.linalg.eigh(metric.gradient.reshape(groups, axes["o"], axes["o"]))
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    sides = [(root @ w.reshape(groups, axes["o"], -1)).reshape(w.shape) for w in (weight, found)]
    return relative_error(sides[0], sides[1], replace(metric, gradient=None), groups)


def fitted(case: Case, layout: Any, metric: Metric) -> Tensor:
    weight = random_weight_of(EXAMPLE_AXES[case[2]])
    return rebuild(decompositions.fit(decompositions.get(case[0]), weight, layout, metric), layout)


def test_all_formats_but_those_that_split_the_outputs_absorb_the_gradients() -> None:
    split = {n for n, v, kind in CASES if not absorbing((n, v, kind))}
    assert split == {"hierarchical_tucker", "kronecker", "monarch", "residual", "ring", "tt_matrix"}


@pytest.mark.parametrize("case", marked(CASES))
@pytest.mark.parametrize("centred", [False, True])
def test_a_fit_is_as_good_as_stated(case: Case, centred: bool) -> None:
    d, axes = decompositions.get(case[0]), EXAMPLE_AXES[case[2]]
    weight, metric = random_weight_of(axes), fisher_of(axes, centred=centred)
    if not absorbing(case):
        layout = layout_at(case, 0.5)
        plain = replace(metric, gradient=None)
        assert torch.equal(fitted(case, layout, metric), fitted(case, layout, plain))
        return
    for place in (0.0, 0.6):
        layout = layout_at(case, place)
        ranks = {axis: layout.axes[axis] for axis in d.full_ranks(axes, case[1])}
        (stated,) = decompositions.errors(d, weight, axes, metric, [ranks], case[1])
        error = measured(weight, fitted(case, layout, metric), axes, metric)
        assert error <= stated * (1.25 if d.estimates else 1 + 1e-6) + 1e-14
        if not d.estimates:
            blind = fitted(case, layout, replace(metric, gradient=None))
            assert error <= measured(weight, blind, axes, metric) * (1 + 1e-3)


@pytest.mark.parametrize("case", PROJECTING)
def test_projections_of_the_outputs_are_the_optimum(case: Case) -> None:
    """The tail of the singular values of ``L^T W M``, ``G = L L^T`` and ``S = M M^T``."""
    axes = EXAMPLE_AXES[case[2]]
    metric, weight = fisher_of(axes), random_weight_of(axes)
    layout = layout_at(case, 0.5)
    groups = axes.get("g", 1)
    assert metric.gradient is not None
    assert metric.second_moment is not None
    lower = torch.linalg.cholesky(metric.gradient.reshape(groups, axes["o"], axes["o"]))
    root = torch.linalg.cholesky(metric.second_moment.reshape(groups, -1, metric.second_moment.shape[-1]))
    energy = torch.linalg.svdvals(lower.mT @ weight.reshape(groups, axes["o"], -1) @ root).square()
    best = float(energy[:, layout.axes["r"] :].sum() / energy.sum())
    assert measured(weight, fitted(case, layout, metric), axes, metric) == pytest.approx(best, rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("case", marked(CASES))
def test_shapes_and_exactness_are_those_of_every_fit(case: Case) -> None:
    d, axes = decompositions.get(case[0]), EXAMPLE_AXES[case[2]]
    weight, metric = random_weight_of(axes), fisher_of(axes)
    layout = d.layout(axes, d.full_ranks(axes, case[1]), case[1])
    factors = decompositions.fit(d, weight, layout, metric)
    assert {key: tuple(f.shape) for key, f in factors.items()} == layout.shapes
    assert all(f.is_contiguous() for f in factors.values())
    assert {f.dtype for f in factors.values()} <= {torch.float64, torch.int32}
    if d.exact_at_full_rank:
        assert_close(rebuild(factors, layout), weight, 1e-12)
    again = decompositions.fit(d, weight.clone(), layout, metric)
    assert all(torch.equal(factors[key], again[key]) for key in factors)
