"""Convolutions through the module door: exactness at full rank for every way to write one, and what must survive."""

from __future__ import annotations

import copy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.frontends.nn import FactoredConv, FactoredLinear, NnProgram
from tdc.ir import Candidate, Plan, Site
from tdc.testing import applicable, assert_close, random_cnn, variants_of

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADS = {1: nn.ConstantPad1d, 2: nn.ZeroPad2d, 3: nn.ConstantPad3d}
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))
NAMES = applicable({"g": 1, "o": 16, "i": 8, "p": 3, "q": 3}, by_default=True)


def full(site: Site, name: str, variant: str) -> Candidate:
    ranks = decompositions.get(name).full_ranks(site.axes, variant)
    return Candidate(site, name, variant, tuple(ranks.items()))


def exact(model: nn.Module, x: Any, name: str = "output_svd", *, pick: int = 0, **options: Any) -> Any:
    """Every convolution (and linear layer, by svd) at full rank; ``pick`` chooses among the variants."""
    choices = []
    for site in NnProgram(model, x).sites()[0]:
        variants = variants_of(name, site.axes)
        known = full(site, name, variants[pick % len(variants)]) if variants else None
        choices.append(known or full(site, "output_svd" if site.kind.is_conv else "svd", ""))
    return tdc.compress(model, x, plan=Plan(tuple(choices)), progress=False, **options)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind in float64, and an input that it takes."""
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    taps, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    inner = groups * draw(st.integers(1 if prod(taps) > 1 else 2, 4))
    outer = groups * draw(st.integers(2, 4))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    padding: Any = draw(st.sampled_from(["valid", "same", "numbers", "numbers"]))
    stride = (1,) * axes if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(axes))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    conv = CONVS[axes](
        inner, outer, taps, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=torch.float64
    )
    lengths = [d * (size - 1) + draw(st.integers(3, 5)) for size, d in zip(taps, dilation, strict=True)]
    parts: list[nn.Module] = [conv]
    if draw(st.booleans()):
        parts.insert(0, PADS[axes]([draw(st.integers(0, 2)) for _ in range(2 * axes)], *([0.0] * (axes != 2))))
    batch = [draw(st.integers(1, 2))] if mode == "zeros" or axes == 3 or draw(st.booleans()) else []
    return nn.Sequential(*parts), torch.randn(*batch, inner, *lengths, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(layer=layers(), pick=st.integers(0, 5))
def test_full_rank_is_exact_for_every_convolution(name: str, layer: tuple[nn.Module, Tensor], pick: int) -> None:
    model, x = layer
    small, dense = exact(model, x, name, pick=pick), model(x)
    assert isinstance(small[-1], FactoredConv)
    assert_close(small(x), dense, 1e-12)
    assert_close(small[-1].weight, model[-1].weight, 1e-12)
    plain = tdc.densify(small)
    assert type(plain[-1]) is type(model[-1])
    assert_close(plain(x), dense, 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_network_is_exact_at_full_rank_and_its_norms_are_folded(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    for bias in (False, True):
        model, x = random_cnn(dtype=dtype, bias=bias), IMAGES.to(dtype)
        small = exact(model, x, name)
        assert_close(small(x), model(x), tolerance)
        assert [type(small[k]) for k in (1, 4, 7)] == [nn.Identity] * 3
        assert [type(model[k]) for k in (1, 4, 7)] == [nn.BatchNorm2d] * 3
        assert sum(isinstance(m, FactoredConv) for m in small.modules()) == 4
        assert all(m.bias is not None for m in small.modules() if isinstance(m, FactoredConv))
        assert_close(tdc.densify(small)(x), model(x), tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_network_computes_the_same_bits(tmp_path: Path, name: str) -> None:
    """Also where a convolution has no bias and gains one with the normalisation."""
    small = tdc.compress(random_cnn(), IMAGES, budget="params=0.6", allow=[name, "svd"], progress=False)
    assert any(isinstance(m, FactoredConv) for m in small.modules())
    tdc.save(small, tmp_path / "m.tdc")
    again = tdc.load(tmp_path / "m.tdc", random_cnn(seed=5))
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert list(again.state_dict()) == list(small.state_dict())
    tdc.save(again, tmp_path / "n.tdc")
    assert (tmp_path / "m.tdc").read_bytes() == (tmp_path / "n.tdc").read_bytes()
    assert torch.equal(copy.deepcopy(small)(IMAGES), small(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_factor_and_bias(name: str) -> None:
    small = exact(random_cnn(), IMAGES, name).train()
    small(IMAGES).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in small.parameters())
    before = float(small(IMAGES).square().sum())
    with torch.no_grad():
        for p in small.parameters():
            p -= 1e-6 * p.grad
    assert float(small(IMAGES).square().sum()) < before


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_is_kept(name: str) -> None:
    model = random_cnn().to(memory_format=torch.channels_last)
    x = IMAGES.contiguous(memory_format=torch.channels_last)
    sites, _ = NnProgram(model, x).sites()
    assert [site.layout for site in sites if site.kind.is_conv] == ["channels_last"] * 4
    assert [site.layout for site in NnProgram(random_cnn(), IMAGES).sites()[0]] == [""] * 5
    small = exact(model, x, name)
    for layer in (m for m in small.modules() if isinstance(m, FactoredConv)):
        wide = [f for f in layer.factors.values() if f.ndim == 4]
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in wide)
        there = torch.randn(2, layer.in_channels, 9, 9).contiguous(memory_format=torch.channels_last)
        assert layer(there).is_contiguous(memory_format=torch.channels_last)
    assert_close(small(x), model(x), 1e-5)
    plain = exact(random_cnn(), IMAGES, name)
    for layer in (m for m in plain.modules() if isinstance(m, FactoredConv)):
        assert layer(torch.randn(2, layer.in_channels, 9, 9)).is_contiguous()


class Pair(nn.Module):
    """Two convolutions and a normalisation, wired by the subclass."""

    def __init__(self) -> None:
        super().__init__()
        made = random_cnn(seed=2)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), made[1]
        self.second = nn.Conv2d(3, 16, 3, padding=1)
        self.eval()


class TwoReaders(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.norm(y) + y + self.second(x)


class TwoCalls(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)) + self.norm(self.second(x))


class Between(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.first(x))) + self.second(x)


@pytest.mark.parametrize("make", [TwoReaders, TwoCalls, Between])
def test_a_norm_that_is_not_of_one_layer_alone_stays(make: type[Pair]) -> None:
    model = make()
    small = exact(model, IMAGES)
    assert type(small.norm) is nn.BatchNorm2d
    assert isinstance(small.first, FactoredConv)
    assert_close(small(IMAGES), model(IMAGES), 1e-5)


def test_a_norm_behind_a_tied_convolution_stays() -> None:
    class Tied(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x)) + self.second(x)

    model = Tied()
    model.second.weight = model.first.weight
    small = exact(model, IMAGES)
    assert type(small.norm) is nn.BatchNorm2d
    assert small.first.factors["u"] is small.second.factors["u"]
    assert small.first.bias is not small.second.bias
    assert_close(small(IMAGES), model(IMAGES), 1e-5)


def test_a_convolution_that_is_called_twice_is_one_site_and_keeps_its_function() -> None:
    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.first(x.flip(-1)) + self.second(x)

    model, known = Twice(), NnProgram(Twice(), IMAGES).sites()[0]
    assert [(site.name, site.uses, site.bias) for site in known] == [
        ("first.weight", 2, False),
        ("second.weight", 1, True),
    ]
    assert_close(exact(model, IMAGES)(IMAGES), model(IMAGES), 1e-5)


def test_convolutions_that_share_a_weight_but_not_a_stride_stay_dense() -> None:
    class Strides(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).mean((2, 3)) + self.second(x).mean((2, 3))

    model = Strides()
    model.second.weight, model.second.stride = model.first.weight, (2, 2)
    sites, remarks = NnProgram(model, IMAGES).sites()
    assert not sites
    assert "stride" in remarks[0].reason


def test_other_convolutions_are_passed_over_with_a_remark() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Kept(nn.Conv2d):
        """A subclass with the forward of its parent is as good as the parent."""

    model = nn.Sequential(
        Kept(3, 8, 3),
        Scaled(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    )
    small = exact(model, IMAGES)
    reasons = {r.site: r.reason for r in tdc.report(small).remarks if r.stage == "find-sites"}
    assert isinstance(small[0], FactoredConv)
    assert type(tdc.densify(small)[0]) is Kept
    assert [type(a) is type(b) for a, b in zip(small[1:], model[1:], strict=True)] == [True] * 3
    assert {"1.weight", "2.weight"} <= set(reasons)
    assert any(name.startswith("3.") for name in reasons)
    assert_close(small(IMAGES), model(IMAGES), 1e-5)


def test_hooks_are_kept_and_what_they_see_is_the_same() -> None:
    model, seen = random_cnn(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(IMAGES)
    small = exact(model, IMAGES)
    small(IMAGES)
    assert_close(seen[-1], seen[0], 1e-5)
    assert type(small[1]) is nn.BatchNorm2d, "a norm behind a layer that a hook watches must not be folded into it"


def test_training_mode_statistics_and_the_original_stay_as_they_are() -> None:
    model = random_cnn().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = exact(model, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in small.modules())
    assert_close(small.eval()(IMAGES), model.eval()(IMAGES), 1e-5)


def test_inplace_cuts_the_model_itself() -> None:
    model, dense = random_cnn(), random_cnn()
    small = exact(model, IMAGES, inplace=True)
    assert small is model
    assert isinstance(model[0], FactoredConv)
    assert isinstance(model[13], FactoredLinear)
    assert_close(model(IMAGES), dense(IMAGES), 1e-5)


@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_budget_holds_and_the_report_counts_the_module(metric: str) -> None:
    data = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    small = tdc.compress(random_cnn(), budget="params=0.5", metric=metric, calibration=data, progress=False)
    report = tdc.report(small)
    assert report.after.params <= 0.5 * report.before.params
    assert report.model_after.params == sum(t.numel() for t in small.state_dict().values() if t.is_floating_point())
    assert report.replaced > 0
