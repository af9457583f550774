"""Counted multiply-adds are those of the closed formulas, and those that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.frontends.count import Counter
from tdc.frontends.nn import NnProgram
from tdc.ir import Candidate, Plan, Site
from tdc.testing import applicable, random_cnn, variants_of

S, T, K, H = 12, 20, 3, 8
"""Input and output channels, window and side of the image of the formulas; the padding is 1."""
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def counted(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), Counter() as counter:
        model(x)
    return counter.macs


def with_ranks(model: nn.Module, x: Tensor, name: str, ranks: Mapping[str, int], variant: str = "") -> nn.Module:
    (site,) = NnProgram(model, x).sites()[0]
    plan = Plan((Candidate(site, name, variant, tuple(ranks.items())),))
    return tdc.compress(model, x, plan=plan, progress=False)


def tucker2(r1: int, r2: int, before: int, after: int) -> int:
    """Kim et al. 2016, eq. 6: ``S R1 H W + R1 R2 D^2 H' W' + R2 T H' W'``."""
    return S * r1 * before**2 + r1 * r2 * K**2 * after**2 + r2 * T * after**2


FORMULAS: dict[str, tuple[dict[str, int], Callable[[int, int], int]]] = {
    "tucker2": ({"s": 5, "r": 4}, lambda before, after: tucker2(4, 5, before, after)),
    "output_svd": ({"r": 6}, lambda before, after: 6 * (S * K**2 + T) * after**2),
    "input_svd": ({"r": 4}, lambda before, after: 4 * S * before**2 + 4 * T * K**2 * after**2),
    "spatial_svd": ({"r": 7}, lambda before, after: 7 * S * K * after * before + 7 * T * K * after**2),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FORMULAS)
def test_multiply_adds_are_those_of_the_literature_and_of_the_run(name: str, stride: int, groups: int) -> None:
    """In groups every step runs once for each group, on that group's channels."""
    ranks, formula = FORMULAS[name]
    conv = nn.Conv2d(groups * S, groups * T, K, stride, 1, groups=groups)
    model, x = nn.Sequential(conv).eval(), torch.randn(1, groups * S, H, H)
    small, after = with_ranks(model, x, name, ranks), H // stride
    (site,) = tdc.report(small).sites
    assert site.before.macs == groups * T * S * K**2 * after**2 == counted(model, x)
    assert site.after.macs == groups * formula(H, after) == counted(small, x)
    assert tdc.report(small).model_after.macs == site.after.macs


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("variant", ["channels_in", "channels_out", "channels"])
def test_pivoted_factors_save_the_square_of_their_rank_at_every_position(variant: str, stride: int) -> None:
    model, x, after = nn.Sequential(nn.Conv2d(S, T, K, stride, 1)).eval(), torch.randn(1, S, H, H), H // stride
    ranks = {"s": 5, "r": 4} if variant == "channels" else {"r": 4}
    small = with_ranks(model, x, "pivoted", ranks, variant)
    expected = {
        "channels_in": 4 * (S - 4) * H**2 + 4 * T * K**2 * after**2,
        "channels_out": 4 * (S * K**2 + T - 4) * after**2,
        "channels": tucker2(4, 5, H, after) - 4**2 * H**2 - 5**2 * after**2,
    }
    assert tdc.report(small).sites[0].after.macs == expected[variant] == counted(small, x)


def half_ranks(site: Site, name: str) -> Candidate:
    variants = variants_of(name, site.axes)
    name, variant = (name, variants[0]) if variants else ("output_svd" if site.kind.is_conv else "svd", "")
    full = decompositions.get(name).full_ranks(site.axes, variant)
    return Candidate(site, name, variant, tuple((axis, max(1, rank // 2)) for axis, rank in full.items()))


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("name", applicable({"g": 1, "o": 16, "i": 8, "p": 3, "q": 3}, by_default=True))
def test_the_report_counts_what_runs_and_what_is_stored(name: str, with_data: bool) -> None:
    model = random_cnn()
    plan = Plan(tuple(half_ranks(site, name) for site in NnProgram(model, IMAGES).sites()[0]))
    options = {"calibration": [IMAGES, IMAGES]} if with_data else {}
    x = IMAGES if with_data else IMAGES[:1]
    small = tdc.compress(model, x, plan=plan, progress=False, **options)
    report = tdc.report(small)
    assert report.before.macs == pytest.approx(counted(model, x), rel=1e-12)
    assert report.after.macs == pytest.approx(counted(small, x), rel=1e-12)
    assert report.model_after.macs == counted(small, x)
    assert report.model_after.params == sum(t.numel() for t in small.state_dict().values() if t.is_floating_point())
    stored = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert report.model_after.bytes == stored


def test_the_peak_of_one_layer_is_its_input_and_output_and_what_lies_between() -> None:
    """1 x 1 to r channels of every entry of the input, then the window: the first step's input and output live at a
    time, or the second one's.
    """
    model, x = nn.Sequential(nn.Conv2d(S, T, K, 2, 1)).eval(), torch.randn(1, S, H, H)
    (site,) = tdc.report(with_ranks(model, x, "input_svd", {"r": 4})).sites
    assert site.before.peak == 4 * (S * H**2 + T * (H // 2) ** 2)
    assert site.after.peak == 4 * max(S * H**2 + 4 * H**2, 4 * H**2 + T * (H // 2) ** 2)


def test_the_counter_sees_the_most_bytes_that_live_at_a_time() -> None:
    with torch.no_grad(), Counter() as counter:
        a = torch.zeros(100)
        b = a + 1
        del a
        c = b + 1
        del b, c
        torch.zeros(150)
    assert counter.peak == 800
    assert counter.macs == 0
