"""Products of named axes, and the steps of alternating least squares, against dense references."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc.decompositions import _contract, _quadratic, rebuild
from tdc.decompositions._als import refine
from tdc.decompositions._contract import contract, macs
from tdc.decompositions._quadratic import Problem
from tdc.ir import Layout, Metric, Rebuild
from tdc.testing import random_factors, random_metric, random_metric_of, random_weight_of, relative_error

LAYOUTS: Mapping[str, tuple[str, dict[str, int]]] = {
    "low-rank": ("o i = u[o r] v[r i]", {"o": 9, "i": 8, "r": 3}),
    "blocks": (
        "(o1 o2) (i1 i2) = a[o1 o2 i1 r] b[r o2 i1 i2]",
        {"o": 11, "i": 12, "o1": 4, "o2": 3, "i1": 3, "i2": 4, "r": 2},
    ),
    "sum": (
        "(o1 o2) (i1 i2) = a[k o1 i1] b[k o2 i2] + u[o1 o2 r] v[r i1 i2]",
        {"o": 12, "i": 12, "o1": 4, "o2": 3, "i1": 3, "i2": 4, "k": 2, "r": 2},
    ),
    "groups": ("(g o) i p = u[(g o) s] core[(g s) r p] v[(g r) i]", {"g": 2, "o": 5, "i": 4, "p": 3, "s": 3, "r": 2}),
    "terms": ("(g o) i p = a[(g o) r] b[(g r) i] c[(g r) p]", {"g": 1, "o": 5, "i": 4, "p": 3, "r": 4}),
}


def problem_of(kind: str, metric: str) -> tuple[Tensor, Layout, Metric, dict[str, Tensor]]:
    text, sizes = LAYOUTS[kind]
    layout = Layout(Rebuild.parse(text), tuple(sizes.items()))
    axes = {axis: sizes[axis] for axis in ("g", "o", "i", "p") if axis in sizes}
    norm = Metric("weight") if metric == "weight" else random_metric_of(axes)
    return random_weight_of(axes), layout, norm, random_factors(layout, seed=1)


@pytest.mark.parametrize("limit", [1 << 25, 40])
def test_a_product_is_that_of_einsum_also_in_slices(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(_contract, "_LARGEST", limit)
    _contract._plan.cache_clear()
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 8, "b": 5, "c": 6, "d": 4, "a'": 7}
    terms = [("a", "b", "c"), ("c", "d", "a'"), ("b", "d"), ("a", "d")]
    operands = [
        (torch.randn([sizes[x] for x in term], generator=generator, dtype=torch.float64), term) for term in terms
    ]
    expected = np.einsum("abc,cde,bd,ad->ade", *(value.numpy() for value, _ in operands))
    assert np.allclose(contract(operands, ("a", "d", "a'")).numpy(), expected, rtol=1e-12)
    _contract._plan.cache_clear()


def test_the_order_is_the_cheapest() -> None:
    sizes = {"o": 50, "r": 2, "i": 60}
    assert macs([("o", "r"), ("r", "i"), ("i",)], ("o",), sizes) == 2 * 60 + 50 * 2


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_the_error_is_that_of_the_weight(kind: str, metric: str) -> None:
    weight, layout, norm, factors = problem_of(kind, metric)
    problem = Problem(weight, layout, norm)
    groups = layout.axes.get("g", 1)
    dense = relative_error(weight, rebuild(factors, layout), norm, groups)
    if kind != "blocks":  # padded outputs count there
        assert problem.error(problem.apart(factors)) == pytest.approx(dense, rel=1e-7)
    restored = problem.stored(problem.apart(factors))
    assert all(torch.equal(restored[name], factors[name]) for name in factors)


def slope(problem: Problem, values: Mapping[str, Tensor], name: str, at: Tensor) -> float:
    """Norm of the derivative of the error by one factor, by automatic differentiation."""
    tuned = at.clone().requires_grad_()
    rest = problem.weight - problem.rebuilt({**values, name: tuned})
    (problem.image(rest) * rest).sum().backward()
    assert tuned.grad is not None
    return float(tuned.grad.norm())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_closed_update_leaves_no_slope(kind: str, metric: str) -> None:
    weight, layout, norm, factors = problem_of(kind, metric)
    problem = Problem(weight, layout, norm)
    values = problem.apart(factors)
    for name in factors:
        new = problem.update(name, values)
        before, after = slope(problem, values, name, values[name]), slope(problem, values, name, new)
        assert after <= 1e-6 * before
        values = {**values, name: new}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_conjugate_gradients_lower_the_error_nearly_as_far(
    monkeypatch: pytest.MonkeyPatch, kind: str, metric: str
) -> None:
    weight, layout, norm, factors = problem_of(kind, metric)
    problem = Problem(weight, layout, norm)
    values = problem.apart(factors)
    before = problem.error(values)
    for name in factors:
        closed = problem.error({**values, name: problem.update(name, values)})
        with monkeypatch.context() as patch:
            patch.setattr(_quadratic, "_CLOSED_SIZE", 0)
            for whole in (0, 512):
                patch.setattr(_quadratic, "_WHOLE_GRAM", whole)
                descended = problem.error({**values, name: problem.update(name, values)})
                assert descended < before
                assert descended - closed <= 0.2 * (before - closed)


def test_refining_never_loses_and_is_bounded_by_the_work_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, layout, norm, factors = problem_of("blocks", "input")
    start = Problem(weight, layout, norm).error(Problem(weight, layout, norm).apart(factors))
    errors = [refine(factors, layout, weight, norm, sweeps=sweeps)[1] for sweeps in (0, 1, 2, 6)]
    assert errors[0] == start > errors[1] > errors[2] > errors[3]
    monkeypatch.setattr("tdc.decompositions._als._SWEEP_WORK", 1)
    assert refine(factors, layout, weight, norm, sweeps=6)[1] == errors[1]
    work = Problem(weight, layout, norm).work(["a", "b"])
    monkeypatch.setattr("tdc.decompositions._als._SWEEP_WORK", work // 3 + 1)
    assert refine(factors, layout, weight, norm, sweeps=6)[1] == errors[2]


def test_a_second_moment_of_many_columns_is_never_multiplied_where_few_factors_do() -> None:
    sizes = {"o": 64, "i": 64, "o1": 8, "o2": 8, "i1": 8, "i2": 8, "k": 1}
    layout = Layout(Rebuild.parse("(o1 o2) (i1 i2) = a[k o1 i1] b[k o2 i2]"), tuple(sizes.items()))
    problem = Problem(random_weight_of({"o": 64, "i": 64}), layout, random_metric(64))
    assert problem.work(["a", "b"]) < 64**3 / 4
