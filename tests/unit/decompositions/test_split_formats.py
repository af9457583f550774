"""The formats of linear weights with split axes: what they recover, what they decline, and what the metric brings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import Decomposition, Factors, rebuild
from tdc.ir import Layout, Metric
from tdc.testing import assert_close, random_factors, random_metric, random_weight, relative_error

NAMES = ("hierarchical_tucker", "k_split", "kronecker", "monarch", "residual", "ring", "tt_matrix")
CASES = [(name, variant) for name in NAMES for variant in decompositions.get(name).equations]
AXES = {"o": 36, "i": 64}
PADDED = {"o": 37, "i": 53}
PLAIN = Metric("weight")

each_case = pytest.mark.parametrize(("name", "variant"), CASES)


def axes_of(name: str, variant: str) -> dict[str, int]:
    """The sizes of the tests, or others that the variant can split."""
    known = decompositions.get(name).variants(AXES)
    return AXES if variant in known else {"o": 272, "i": 256}


def anisotropic(columns: int) -> Metric:
    """The metric of inputs of very unequal scales, correlated."""
    scale = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    second = random_metric(columns, seed=3).second_moment
    assert second is not None
    return Metric("input", scale[:, None] * second * scale)


def own_weight(layout: Layout) -> Tensor:
    """A weight that the layout holds, of random factors."""
    return rebuild(random_factors(layout, seed=5), layout)


def fitted(d: Decomposition, weight: Tensor, layout: Layout, metric: Metric) -> tuple[Factors, Tensor]:
    factors = d.fit(weight, layout, metric)
    return factors, rebuild(factors, layout)


@each_case
def test_a_weight_of_the_format_is_recovered(name: str, variant: str) -> None:
    d, axes = decompositions.get(name), axes_of(name, variant)
    ranks = {axis: min(2, full) for axis, full in d.full_ranks(axes, variant).items()}
    layout = d.layout(axes, ranks, variant)
    weight = own_weight(layout)
    assert relative_error(weight, fitted(d, weight, layout, PLAIN)[1], PLAIN) < 1e-3
    metric = random_metric(axes["i"])
    assert relative_error(weight, fitted(d, weight, layout, metric)[1], metric) < 2e-3


@each_case
@pytest.mark.parametrize("metric", ["weight", "input", "singular"])
def test_full_rank_is_exact_also_with_padding(name: str, variant: str, metric: str) -> None:
    d = decompositions.get(name)
    exact = getattr(d, "exact_at_full_rank", True)
    for axes in (AXES, PADDED, {"o": 16, "i": 53}, {"o": 53, "i": 16}):
        if not exact or variant not in d.variants(axes):
            continue
        rank = axes["i"] // 2 if metric == "singular" else None
        norm = PLAIN if metric == "weight" else random_metric(axes["i"], rank=rank)
        weight = random_weight(axes["o"], axes["i"])
        layout = d.layout(axes, d.full_ranks(axes, variant), variant)
        assert_close(fitted(d, weight, layout, norm)[1], weight, 1e-12)


@each_case
def test_the_error_falls_with_the_rank_and_the_metric_is_what_is_fitted(name: str, variant: str) -> None:
    d, axes = decompositions.get(name), axes_of(name, variant)
    weight, metric = random_weight(axes["o"], axes["i"]), anisotropic(axes["i"])
    lattice = [dict(ranks) for ranks in d.rank_lattice(axes, 1, variant)]
    layouts = [d.layout(axes, ranks, variant) for ranks in lattice[:: max(1, len(lattice) // 3)]]
    found = [relative_error(weight, fitted(d, weight, layout, metric)[1], metric) for layout in layouts]
    plain = [relative_error(weight, fitted(d, weight, layout, PLAIN)[1], metric) for layout in layouts]
    assert all(later < error for error, later in pairwise(found))
    assert all(here < 0.95 * there for here, there in zip(found, plain, strict=True))


@pytest.mark.parametrize(("name", "variant"), [("kronecker", "balanced"), ("monarch", "balanced"), ("residual", "")])
def test_what_is_padded_is_cut_off_again(name: str, variant: str) -> None:
    d = decompositions.get(name)
    weight, metric = random_weight(37, 53), random_metric(53)
    lattice = d.rank_lattice(PADDED, 1, variant)
    layout = d.layout(PADDED, lattice[-1], variant)
    for norm in (PLAIN, metric):
        approximation = fitted(d, weight, layout, norm)[1]
        assert approximation.shape == (37, 53)
        stated = d.errors(weight, PADDED, norm, lattice, variant)[-1]
        assert relative_error(weight, approximation, norm) <= stated + 1e-12 < 0.1


@each_case
def test_scale_and_sign_are_settled(name: str, variant: str) -> None:
    d, axes = decompositions.get(name), axes_of(name, variant)
    ranks = d.rank_lattice(axes, 1, variant)[2 if len(d.rank_lattice(axes, 1, variant)) > 2 else 0]
    layout = d.layout(axes, ranks, variant)
    for norm in (PLAIN, anisotropic(axes["i"])):
        factors = d.fit(random_weight(axes["o"], axes["i"]), layout, norm)
        for piece in layout.rebuild.pieces:
            parts = [factors[operand] for operand in piece.operands]
            norms = torch.stack([part.norm() for part in parts])
            assert_close(norms, norms.mean().expand(len(parts)), 1e-9)
            assert all(float(part.flatten()[part.abs().argmax()]) > 0 for part in parts[:-1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [{"o": 3, "i": 3}, {"o": 13, "i": 13}, {"o": 1, "i": 1}, {"o": 2, "i": 7}])
def test_small_and_prime_sizes_are_declined(name: str, axes: dict[str, int]) -> None:
    assert decompositions.get(name).variants(axes) == ()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "k_split"])
def test_a_layout_of_a_declined_size_says_so(name: str) -> None:
    d = decompositions.get(name)
    variant = next(iter(d.equations))
    with pytest.raises(ValueError, match=f"{name} cannot split 13 x 16"):
        d.layout({"o": 13, "i": 16}, {"r": 1}, variant)


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_are_declined(name: str) -> None:
    assert decompositions.get(name).variants({"g": 1, "o": 16, "i": 16, "p": 3}) == ()


@pytest.mark.parametrize(("name", "variant"), [("kronecker", "balanced"), ("monarch", "4x"), ("k_split", "4")])
def test_without_an_input_the_stated_errors_are_those_of_the_fits(name: str, variant: str) -> None:
    d, axes = decompositions.get(name), {"o": 64, "i": 48}
    weight = random_weight(64, 48)
    lattice = d.rank_lattice(axes, 1, variant)
    for ranks, stated in zip(lattice, d.errors(weight, axes, PLAIN, lattice, variant), strict=True):
        layout = d.layout(axes, ranks, variant)
        measured = relative_error(weight, fitted(d, weight, layout, PLAIN)[1], PLAIN)
        assert measured == pytest.approx(stated, rel=1e-9)
