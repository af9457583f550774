"""CP of convolutions: recovery, the metric, and the correction of terms that grow and cancel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import Factors, cancellation, rebuild
from tdc.decompositions._als import refine
from tdc.decompositions._canonical import canonical
from tdc.decompositions._sensitivity import columns, corrected, sensitivity
from tdc.ir import Layout, Metric
from tdc.testing import EXAMPLE_AXES, random_metric_of, random_weight_of, relative_error

D = decompositions.get("cp")
WEIGHT = Metric("weight")
KINDS = ("conv1d", "conv2d", "conv2d-groups", "conv3d")
BORDER = {"g": 1, "o": 8, "i": 7, "p": 3}


def metric_of(name: str, axes: dict[str, int]) -> Metric:
    return WEIGHT if name == "weight" else random_metric_of(axes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_sum_of_three_outer_products_is_found_again(kind: str, metric: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    weight, norm = random_weight_of(axes, rank=3), metric_of(metric, axes)
    layout = D.layout(axes, {"r": 3}, "")
    found = rebuild(D.fit(weight, layout, norm), layout)
    assert relative_error(weight, found, WEIGHT, axes["g"]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_in_the_metric_is_better_there_than_that_of_the_weight(kind: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    weight, norm, layout = random_weight_of(axes), random_metric_of(axes), D.layout(axes, {"r": 3}, "")
    mine, other = (rebuild(D.fit(weight, layout, m), layout) for m in (norm, WEIGHT))
    errors = [relative_error(weight, found, norm, axes["g"]) for found in (mine, other)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("metric", ["weight", "input"])
def test_predictions_fall_with_the_rank_and_the_fits_keep_those_of_the_ends(metric: str) -> None:
    axes = dict(EXAMPLE_AXES["conv2d-groups"])
    weight, norm, lattice = random_weight_of(axes), metric_of(metric, axes), D.rank_lattice(axes, 1, "")
    stated = D.errors(weight, axes, norm, lattice, "")
    assert all(later < error for error, later in pairwise(stated))
    for k in (0, -1):
        layout = D.layout(axes, lattice[k], "")
        found = rebuild(D.fit(weight, layout, norm), layout)
        assert relative_error(weight, found, norm, axes["g"]) <= stated[k] * (1 + 1e-6)


def test_columns_of_a_term_have_one_norm_and_the_sign_lies_in_the_last_factor() -> None:
    axes = dict(EXAMPLE_AXES["conv2d-groups"])
    layout = D.layout(axes, {"r": 4}, "")
    parts = columns(D.fit(random_weight_of(axes), layout, WEIGHT), layout)
    norms = torch.stack([part.norm(dim=1) for part in parts.values()])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-12, atol=0)
    *front, _ = parts.values()
    for part in front:
        assert (part.gather(1, part.abs().argmax(1, keepdim=True)) > 0).all()


def test_windows_of_one_tap_are_declined() -> None:
    axes = dict(EXAMPLE_AXES["conv2d-pointwise"])
    assert D.variants(axes) == ()
    assert D.rank_lattice(axes, 1, "") == []


def test_alternating_least_squares_finds_an_exact_sum_of_order_four() -> None:
    parts = [normal(2, n, 3, seed=n) for n in (7, 6, 5, 4)]
    tensor = torch.einsum("gar,gbr,gcr,gdr->gabcd", *parts)
    found = torch.einsum("gar,gbr,gcr,gdr->gabcd", *canonical(tensor, 3))
    assert float((found - tensor).norm() / tensor.norm()) < 1e-6


def border(noise: float) -> tuple[Tensor, Layout]:
    """``x x y + x y x + y x x`` in larger modes, and noise: sums of two terms come as near as one likes, growing."""
    u, v, w = (torch.linalg.qr(normal(n, 2, seed=n)).Q for n in (BORDER["o"], BORDER["i"], BORDER["p"]))
    state = torch.zeros(2, 2, 2, dtype=torch.float64)
    state[0, 0, 1] = state[0, 1, 0] = state[1, 0, 0] = 1.0
    weight = torch.einsum("abc,oa,ib,pc->oip", state, u, v, w)
    return weight + noise * normal(*weight.shape, seed=5), D.layout(BORDER, {"r": 2}, "")


def difference(step: float) -> Factors:
    """``((x + t y)^3 - x^3) / t``: two terms near the border, of size 1 / t."""
    u, v, w = (torch.linalg.qr(normal(n, 2, seed=n)).Q for n in (BORDER["o"], BORDER["i"], BORDER["p"]))
    a, b, c = (torch.stack([part[:, 0] + step * part[:, 1], part[:, 0]], 1) for part in (u, v, w))
    sign = torch.tensor([1 / step, -1 / step], dtype=torch.float64)
    return {"a": a * sign, "c": c.mT.contiguous(), "b": b.mT.contiguous()}


@pytest.mark.parametrize("metric", ["weight", "input"])
def test_the_correction_cuts_the_sensitivity_of_a_border_rank_weight_threefold(metric: str) -> None:
    weight, layout = border(0.02)
    norm = metric_of(metric, BORDER)
    plain, _ = refine(difference(0.03), layout, weight, norm)
    calm = corrected(plain, layout, weight, norm)
    before, after = (relative_error(weight, rebuild(f, layout), norm) for f in (plain, calm))
    assert after <= 1.02**2 * before * (1 + 1e-4)
    assert sensitivity(calm, layout) < sensitivity(plain, layout) / 3
    assert cancellation(calm, layout) < cancellation(plain, layout)


def test_corrected_factors_bear_rounding_to_bfloat16() -> None:
    """With them it adds less than a hundredth to the error; with the others more than a tenth."""
    weight, layout = border(0.02)
    plain, _ = refine(difference(0.03), layout, weight, WEIGHT)
    calm = corrected(plain, layout, weight, WEIGHT)
    grown = []
    for factors in (plain, calm):
        rounded = {name: factor.bfloat16().double() for name, factor in factors.items()}
        now, then = (relative_error(weight, rebuild(f, layout), WEIGHT) for f in (rounded, factors))
        grown.append(now / then)
    assert grown[1] < 1.01
    assert grown[0] > 1.1


def test_terms_that_are_far_too_large_are_brought_down_at_more_error() -> None:
    weight, layout = border(0.0)
    start = difference(1e-3)
    assert cancellation(start, layout) > 500
    calm = corrected(start, layout, weight, WEIGHT)
    assert cancellation(calm, layout) <= 50
    assert max(columns(calm, layout)[n].norm(dim=1).max() for n in "abc") ** 3 <= 5 * weight.norm()
    assert relative_error(weight, rebuild(calm, layout), WEIGHT) < 0.1
