"""One decomposition for several weights of one input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import Layout, Metric
from tdc.testing import random_weight_of

WIDTHS = (24, 10, 16)
INPUTS = 20


def moment(size: int, seed: int) -> Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / (2 * size)


def weights() -> list[Tensor]:
    return [random_weight_of({"o": o, "i": INPUTS}, seed=k) for k, o in enumerate(WIDTHS)]


def metrics(name: str) -> list[Metric]:
    if name == "weight":
        return [Metric("weight") for _ in WIDTHS]
    second = moment(INPUTS, 9)
    if name == "input":
        return [Metric("input", second) for _ in WIDTHS]
    return [Metric("fisher", second, gradient=moment(o, 20 + o)) for o in WIDTHS]


def layouts(name: str, variant: str, rank: int) -> tuple[Layout, list[Layout]]:
    whole = decompositions.get(name).layout({"o": sum(WIDTHS), "i": INPUTS}, {"r": rank}, variant)
    return whole, [whole.with_size("o", o) for o in WIDTHS]


def lost(difference: Tensor, metric: Metric) -> float:
    left = difference if metric.gradient is None else metric.gradient @ difference
    right = difference if metric.second_moment is None else difference @ metric.second_moment
    return float((left * right).sum())


@pytest.mark.parametrize("metric", ["weight", "input", "fisher"])
@pytest.mark.parametrize(("name", "variant"), [("svd", ""), ("pivoted", "input")])
def test_the_error_is_the_optimum_of_all_weights_together(name: str, variant: str, metric: str) -> None:
    losses = [3.0, 0.5, 1.0]
    given, norms = weights(), metrics(metric)
    whole = decompositions.stacked(given, norms, losses)
    layout, members = layouts(name, variant, 7)
    decomposition = decompositions.get(name)
    fits = decompositions.fit_stacked(decomposition, whole, layout, members)
    parts = [
        loss * lost(w - decompositions.rebuild(f, m), n) / lost(w, n)
        for w, f, m, n, loss in zip(given, fits, members, norms, losses, strict=True)
    ]
    axes = {"o": sum(WIDTHS), "i": INPUTS}
    (predicted,) = decomposition.errors(whole.weight, axes, whole.metric, [{"r": 7}], variant)
    assert sum(parts) == pytest.approx(predicted * sum(losses), rel=1e-9)
    assert predicted == pytest.approx(least(given, norms, losses, 7), rel=1e-9)


def least(given: list[Tensor], norms: list[Metric], losses: list[float], rank: int) -> float:
    """By singular values of the weights in roots of their metrics, scaled and one above the other."""
    rows = []
    for weight, metric, loss in zip(given, norms, losses, strict=True):
        outer = torch.eye(len(weight), dtype=weight.dtype) if metric.gradient is None else metric.gradient
        inner = torch.eye(INPUTS, dtype=weight.dtype) if metric.second_moment is None else metric.second_moment
        roots = [v @ e.clamp(min=0).sqrt().diag() @ v.T for e, v in map(torch.linalg.eigh, (outer, inner))]
        rows.append((loss / lost(weight, metric)) ** 0.5 * roots[0] @ weight @ roots[1])
    energy = torch.linalg.svdvals(torch.cat(rows)).square()
    return float(energy[rank:].sum() / energy.sum())


@pytest.mark.parametrize(("name", "variant"), [("svd", ""), ("pivoted", "input")])
def test_the_factors_without_outputs_are_the_same_tensors_and_all_is_exact_at_full_rank(
    name: str, variant: str
) -> None:
    given = weights()
    whole = decompositions.stacked(given, metrics("fisher"), [1.0, 2.0, 0.0])
    layout, members = layouts(name, variant, INPUTS)
    fits = decompositions.fit_stacked(decompositions.get(name), whole, layout, members)
    common = decompositions.shared(layout)
    assert common == ({"v"} if name == "svd" else {"coef", "order"})
    assert all(fit[key] is fits[0][key] for fit in fits for key in common)
    for weight, fit, member in zip(given, fits, members, strict=True):
        assert {key: tuple(f.shape) for key, f in fit.items()} == dict(member.shapes)
        assert float((decompositions.rebuild(fit, member) - weight).norm() / weight.norm()) < 1e-10


def test_branches_of_convolutions_share_their_first_one() -> None:
    axes = {"g": 1, "o": 12, "i": 8, "p": 3, "q": 3}
    given = [random_weight_of(axes, seed=k) for k in range(2)]
    whole = decompositions.stacked(given, [Metric("input", moment(72, 1)[None])] * 2, [1.0, 1.0])
    layout = decompositions.get("output_svd").layout({**axes, "o": 24}, {"r": 24}, "")
    members = [layout.with_size("o", 12)] * 2
    fits = decompositions.fit_stacked(decompositions.get("output_svd"), whole, layout, members)
    assert decompositions.shared(layout)
    for weight, fit in zip(given, fits, strict=True):
        assert float((decompositions.rebuild(fit, members[0]) - weight).norm() / weight.norm()) < 1e-10


def test_formats_that_split_pivot_or_group_the_outputs_share_nothing() -> None:
    axes = {"o": 64, "i": 64}
    grouped = {"g": 2, "o": 8, "i": 8, "p": 3, "q": 3}
    for name, variant, sizes in (("pivoted", "output", axes), ("tt_matrix", "3", axes), ("output_svd", "", grouped)):
        decomposition = decompositions.get(name)
        ranks = dict.fromkeys(decomposition.full_ranks(sizes, variant), 2)
        assert decompositions.shared(decomposition.layout(sizes, ranks, variant)) == frozenset()
