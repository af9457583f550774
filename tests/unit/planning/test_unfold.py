"""Which matrix of the weight each rank of a layout belongs to, and the ranks that its singular values suggest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.errors import OptionError
from tdc.ir import Decline, Layout, Metric, Rebuild
from tdc.options import named_allocation, read_allocation
from tdc.planning import unfold
from tdc.planning.suggest import rule
from tdc.planning.unfold import Suggested, singular_values, unfolding
from tdc.testing import EXAMPLE_AXES, random_metric_of, random_weight_of

NO_MATRIX = {"block_term", "cp", "cp4", "residual", "ring", "tucker_cp"}
AXES: Mapping[str, Mapping[str, int]] = {
    **{name: EXAMPLE_AXES[name] for name in ("linear-composite", "linear-wide", "conv1d", "conv3d")},
    "conv2d": {"g": 2, "o": 12, "i": 10, "p": 3, "q": 3},
    "conv2d-even": {"g": 1, "o": 12, "i": 8, "p": 3, "q": 3},
}


def layouts(axes: Mapping[str, int]) -> list[tuple[str, str, Layout]]:
    """Name, variant and layout at full rank of every format for a weight of these axes."""
    found = []
    for name in decompositions.names():
        d = decompositions.get(name)
        found += [(name, v, d.layout(axes, d.full_ranks(axes, v), v)) for v in d.variants(axes)]
    return found


def full_ranks(name: str, variant: str, axes: Mapping[str, int]) -> dict[str, int]:
    return decompositions.get(name).full_ranks(axes, variant)


@pytest.mark.parametrize(
    ("equation", "rank", "expected"),
    [
        ("o i = u[o r] v[r i]", "r", "() (o) x (i)"),
        ("o i = pivot(coef, place)[o r] rows[r i]", "r", "() (o) x (i)"),
        ("(g o) i p q = u[(g o) s] core[(g s) r p q] v[(g r) i]", "s", "(g) (o) x (i p q)"),
        ("(g o) i p q = u[(g o) s] core[(g s) r p q] v[(g r) i]", "r", "(g) (o p q) x (i)"),
        ("(g o) i p q = u[(g o) r q] v[(g r) i p]", "r", "(g) (o q) x (i p)"),
        ("(g o) i p q = u[(g o) s] w[(g s) l q] h[(g l) r p] v[(g r) i]", "l", "(g) (o q) x (i p)"),
        ("(o1 o2) (i1 i2) = a[k o1 i1] b[k o2 i2]", "k", "() (o1 i1) x (o2 i2)"),
        ("(o1 o2) (i1 i2) = a[o1 o2 i1 r] b[r o2 i1 i2]", "r", "(o2 i1) (o1) x (i2)"),
        ("(o1 o2 o3) (i1 i2 i3) = a[o1 i1 r] b[r o2 i2 s] c[s o3 i3]", "s", "() (o1 o2 i1 i2) x (o3 i3)"),
        (
            "(o1 o2 o3 o4) (i1 i2 i3 i4) = u[o1 i1 a] v[o2 i2 h] w[o3 i3 c] y[o4 i4 d] s[a h e] t[c d e]",
            "e",
            "() (o1 o2 i1 i2) x (o3 o4 i3 i4)",
        ),
    ],
)
def test_a_rank_between_two_parts_is_that_of_the_axes_of_one_times_those_of_the_other(
    equation: str, rank: str, expected: str
) -> None:
    found = unfolding(Rebuild.parse(equation), rank)
    assert not isinstance(found, Decline)
    assert f"({' '.join(found.shared)}) {found}" == expected


@pytest.mark.parametrize(
    ("equation", "rank", "reason"),
    [
        ("(g o) i p = a[(g o) r] c[(g r) p] b[(g r) i]", "r", "its rank r belongs to 3 factors (a, c, b)"),
        ("(o1 o2) i = a[t o1 r] b[r o2 s] c[s i t]", "s", "its rank s is on a cycle of factors (b, c)"),
        ("(g o) i p = u[(g o) (h s)] core[(g h s) r p] v[(g h r) i]", "s", "on a cycle of factors (u, core)"),
        ("o i = u[o r s] v[s r i]", "s", "its rank s is on a cycle of factors (u, v)"),
        ("o i = a[o r] b[r i] + c[o s] d[s i]", "r", "it is a sum of products"),
    ],
)
def test_a_rank_of_no_matrix_is_declined_with_the_factors(equation: str, rank: str, reason: str) -> None:
    found = unfolding(Rebuild.parse(equation), rank)
    assert isinstance(found, Decline)
    assert reason in found.reason


def test_the_formats_with_ranks_of_no_matrix_are_these() -> None:
    declined, served = set(), set()
    for axes in AXES.values():
        for name, variant, whole in layouts(axes):
            found = [unfolding(whole.rebuild, rank) for rank in full_ranks(name, variant, axes)]
            (declined if any(isinstance(each, Decline) for each in found) else served).add(name)
    assert declined == NO_MATRIX
    every = {name for name in decompositions.names() if not decompositions.get(name).between_layers}
    assert declined | served == every
    assert not declined & served


@pytest.mark.parametrize("case", sorted(set(AXES) - {"linear-wide"}))
def test_a_weight_that_a_format_holds_at_some_ranks_has_these_ranks(case: str) -> None:
    axes, seen = AXES[case], 0
    for name, variant, whole in layouts(axes):
        if name in NO_MATRIX:
            continue
        d = decompositions.get(name)
        asked = {axis: max(1, rank // 3) for axis, rank in full_ranks(name, variant, axes).items()}
        shared = {axis: unfolding(whole.rebuild, axis).shared for axis in asked}  # type: ignore[union-attr]
        ranks = unfold._spanned(whole, asked, shared)
        layout = d.layout(axes, ranks, variant)
        weight = decompositions.rebuild(d.fit(random_weight_of(axes), layout, Metric("weight")), layout)
        assert Suggested("energy=0.9999999999", weight).ranks(whole, ranks) == ranks, (name, variant)
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("metric", ["weight", "input"])
@pytest.mark.parametrize("case", sorted(AXES))
def test_every_format_can_be_fitted_at_the_ranks_that_are_suggested(case: str, metric: str) -> None:
    axes, seen = AXES[case], 0
    weight = random_weight_of(axes, seed=3)
    norm = Metric("weight") if metric == "weight" else random_metric_of(axes)
    suggested = Suggested("energy=0.8", weight)
    for name, variant, whole in layouts(axes):
        d = decompositions.get(name)
        ranks = suggested.ranks(whole, d.full_ranks(axes, variant))
        if isinstance(ranks, Decline):
            assert name in NO_MATRIX
            continue
        layout = d.layout(axes, ranks, variant)
        factors = decompositions.fit(d, weight, layout, norm)
        assert {key: tuple(factor.shape) for key, factor in factors.items()} == layout.shapes
        lost = float((decompositions.rebuild(factors, layout) - weight).square().sum() / weight.square().sum())
        if metric == "weight" and d.exact_at_full_rank:
            assert lost <= 0.2 * len(ranks) + 1e-9, (name, variant)  # each unfolding loses at most its share
        seen += 1
    assert seen >= 2


def test_singular_values_are_those_of_each_group() -> None:
    axes = AXES["conv2d"]
    d, weight = decompositions.get("spatial_svd"), random_weight_of(axes)
    layout = d.layout(axes, {"r": 3}, "")
    matrix = unfolding(layout.rebuild, "r")
    assert not isinstance(matrix, Decline)
    found = singular_values(weight, layout, matrix)
    groups = weight.reshape(2, 12, 10, 3, 3).numpy().transpose(0, 1, 4, 2, 3).reshape(2, 36, 30)
    wanted = np.stack([np.linalg.svd(group, compute_uv=False) for group in groups])
    assert np.allclose(found.numpy() / found.max().item(), wanted / wanted.max(), atol=1e-7)
    assert float(singular_values(weight * 0, layout, matrix).max()) == 0


def test_an_axis_that_is_split_into_more_is_bordered_by_zeros() -> None:
    axes = {"o": 47, "i": 61}
    d, weight = decompositions.get("kronecker"), random_weight_of({"o": 47, "i": 61})
    layout = d.layout(axes, {"k": 1}, "balanced")
    sizes = layout.axes
    assert (sizes["o1"] * sizes["o2"], sizes["i1"] * sizes["i2"]) != (47, 61)
    matrix = unfolding(layout.rebuild, "k")
    assert not isinstance(matrix, Decline)
    bordered = np.zeros((sizes["o1"] * sizes["o2"], sizes["i1"] * sizes["i2"]))
    bordered[:47, :61] = weight.numpy()
    cube = bordered.reshape(sizes["o1"], sizes["o2"], sizes["i1"], sizes["i2"]).transpose(0, 2, 1, 3)
    wanted = np.linalg.svd(cube.reshape(sizes["o1"] * sizes["i1"], -1), compute_uv=False)
    found = singular_values(weight, layout, matrix)[0].numpy()
    assert np.allclose(found / found[0], wanted / wanted[0], atol=1e-7)


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return left @ right + noise * torch.randn(rows, columns, generator=generator)


def svd_ranks(allocation: str, weight: Tensor) -> dict[str, int] | Decline:
    axes = {"o": weight.shape[0], "i": weight.shape[1]}
    whole = decompositions.get("svd").layout(axes, {"r": min(weight.shape)}, "")
    return Suggested(allocation, weight).ranks(whole, ["r"])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_planted_rank_is_found_with_and_without_noise(scale: float) -> None:
    assert svd_ranks("evbmf", scale * planted(90, 60, 7, 0.0)) == {"r": 7}
    assert svd_ranks("evbmf", scale * planted(90, 60, 7, 0.3)) == {"r": 7}
    assert svd_ranks("energy=0.9999999", scale * planted(90, 60, 7, 0.0)) == {"r": 7}


def test_a_weight_that_suggests_no_rank_is_declined() -> None:
    noise = svd_ranks("evbmf", planted(90, 60, 1, 1e6))
    assert isinstance(noise, Decline)
    assert noise.reason == "evbmf finds no rank r: the weight as (o) x (i) is all noise, or zero"
    assert isinstance(svd_ranks("energy=0.5", torch.zeros(9, 6)), Decline)


def test_of_several_groups_the_largest_rank_counts() -> None:
    axes = {"g": 3, "o": 12, "i": 20, "p": 1}
    groups = [planted(12, 20, rank, 0.0) for rank in (2, 5, 1)]
    whole = decompositions.get("output_svd").layout(axes, {"r": 12}, "")
    weight = torch.cat(groups).reshape(36, 20, 1)
    assert Suggested("energy=0.999999999", weight).ranks(whole, ["r"]) == {"r": 5}


def test_ranks_that_their_neighbours_cannot_fill_are_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``s <= taps r``: a pointwise factor has no use for more outputs than the core gives."""
    axes = {"g": 1, "o": 20, "i": 12, "p": 3}
    whole = decompositions.get("tucker2").layout(axes, {"s": 20, "r": 12}, "")
    monkeypatch.setattr(unfold, "rule", lambda name: lambda values, rows, columns: 2 if rows == 60 else 15)
    assert Suggested("any", random_weight_of(axes)).ranks(whole, ["s", "r"]) == {"s": 6, "r": 2}


def test_singular_values_are_worked_out_once_for_one_unfolding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = unfold.singular_values
    monkeypatch.setattr(unfold, "singular_values", lambda *given: calls.append(given) or real(*given))
    axes = {"g": 1, "o": 12, "i": 8, "p": 3, "q": 3}
    suggested = Suggested("energy", random_weight_of(axes))
    for name in ("output_svd", "tucker2", "input_svd", "spatial_svd"):
        full = full_ranks(name, "", axes)
        assert not isinstance(suggested.ranks(decompositions.get(name).layout(axes, full, ""), full), Decline)
    assert len(calls) == 3


def test_allocations_are_read_with_their_share() -> None:
    assert read_allocation("energy") == ("energy", 0.95)
    assert read_allocation(" energy = 0.5") == ("energy", 0.5)
    assert read_allocation("evbmf")[0] == "evbmf"
    assert [named_allocation(name) for name in ("energy", "energy=0.90", "evbmf", "uniform")] == [
        "energy=0.95",
        "energy=0.9",
        "evbmf",
        "uniform",
    ]
    values = [4.0, 0.9, 1.7]
    assert [rule(name)(values, 3, 9) for name in ("energy=0.8", "energy", "energy=0.99")] == [1, 2, 3]
    with pytest.raises(OptionError, match="it takes a budget"):
        rule("uniform")
