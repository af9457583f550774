"""The error that a report states is the one that is measured on data that the fit has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tdc
from tdc import decompositions
from tdc.frontends.nn import FactoredConv, NnProgram
from tdc.ir import Candidate, Plan, Site
from tdc.testing import applicable, random_cnn, random_weight_of, variants_of

BATCHES, EXAMPLES = 4, 24


def conv(kind: Callable[..., nn.Module], *arguments: int, **options: object) -> nn.Module:
    """A convolution with weights of falling spectrum."""
    layer = kind(*arguments, **options)
    groups = layer.groups
    with torch.no_grad():
        rows, inner, *taps = layer.weight.shape
        axes = dict(zip("goipqz", (groups, rows // groups, inner, *taps), strict=False))
        layer.weight.copy_(random_weight_of(axes))
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, rows))
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: conv(nn.Conv2d, 8, 12, 3, padding=1),
    "stride": lambda: conv(nn.Conv2d, 8, 12, 3, stride=2, padding=1),
    "dilation": lambda: conv(nn.Conv2d, 8, 12, 3, padding=2, dilation=2),
    "groups": lambda: conv(nn.Conv2d, 12, 16, 3, padding=1, groups=2),
    "no-bias": lambda: conv(nn.Conv2d, 8, 12, 3, padding=1, bias=False),
    "reflect": lambda: conv(nn.Conv2d, 8, 12, 3, padding=2, padding_mode="reflect"),
    "row": lambda: conv(nn.Conv2d, 8, 12, (1, 5), padding=(0, 2)),
    "pointwise": lambda: conv(nn.Conv2d, 16, 12, 1),
    "line": lambda: conv(nn.Conv1d, 8, 12, 5, stride=2, padding=2),
    "volume": lambda: conv(nn.Conv3d, 6, 8, (2, 3, 2), padding=1),
}


def images(layer: nn.Module, seed: int) -> Tensor:
    """Smooth random images with a mean, as a layer behind a ReLU gets them."""
    axes, width = len(layer.kernel_size), layer.in_channels
    lengths = {1: (128,), 2: (16, 16), 3: (8, 8, 8)}[axes]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(BATCHES * EXAMPLES, width, *(n + 2 for n in lengths), generator=generator)
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[axes - 1]
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    mixed = torch.einsum("nc...,cd->nd...", pool(noise, 3, 1), mix + torch.eye(width))
    return torch.relu(3 * mixed + 0.2)


def middle(site: Site, name: str, variant: str) -> Candidate:
    """Ranks at which a good part is lost, but not most of it."""
    full = decompositions.get(name).full_ranks(site.axes, variant)
    return Candidate(site, name, variant, tuple((axis, max(1, rank // 3)) for axis, rank in full.items()))


def compressed(model: nn.Module, data: Sequence[Tensor], name: str, variant: str) -> nn.Module:
    known = tdc.calibrate(model, data, progress=False)
    (site,) = NnProgram(model, data[0]).sites()[0]
    return applied(model, data[0][:1], middle(site, name, variant), known)


def applied(model: nn.Module, x: Tensor, choice: Candidate, known: tdc.Statistics) -> nn.Module:
    """With the factors one after the other, or where no convolution can, with the weight that they build."""
    try:
        plan = Plan((choice,), metric="input")
        return tdc.compress(model, x, plan=plan, statistics=known, progress=False)
    except tdc.PlanError as error:
        if "by itself" not in str(error):
            raise
    plan = Plan((replace(choice, execution="stored"),), metric="input")
    return tdc.compress(model, x, plan=plan, statistics=known, progress=False)


CASES = [
    (layer, name, variant)
    for layer, make in LAYERS.items()
    for axes in [dict(NnProgram(nn.Sequential(make()), images(make(), 0)[:1]).sites()[0][0].axes)]
    for name in applicable(axes, by_default=True)
    for variant in variants_of(name, axes)
]


@pytest.mark.parametrize(("layer", "name", "variant"), CASES)
def test_the_stated_error_is_measured_on_other_data(layer: str, name: str, variant: str) -> None:
    """At some 24 000 positions for at most 100 inputs, what the fit learns of its data alone is below 1 %."""
    model = nn.Sequential(LAYERS[layer]()).eval()
    small = compressed(model, images(model[0], 1).chunk(BATCHES), name, variant)
    (site,) = tdc.report(small).sites
    other, offset = (
        images(model[0], 2),
        0 if model[0].bias is None else model[0].bias.reshape(-1, *[1] * (model[0].weight.ndim - 2)),
    )
    with torch.no_grad():
        dense, new = model(other), small(other)
        measured = float((new - dense).square().mean() / (dense - offset).square().mean())
    assert isinstance(small[0], FactoredConv)
    assert 1e-4 < site.error < 0.9
    assert 0.95 < measured / site.error < 1.10


@pytest.mark.parametrize(("layer", "name", "variant"), [case for case in CASES if case[0] in ("stride", "groups")])
def test_the_bias_takes_up_the_mean_of_the_change(layer: str, name: str, variant: str) -> None:
    model = nn.Sequential(LAYERS[layer]()).eval()
    data = images(model[0], 1).chunk(2 * BATCHES)  # few enough positions a batch for all of them to be taken
    small = compressed(model, data, name, variant)
    with torch.no_grad():
        change = torch.cat([small(x) - model(x) for x in data])
    mean = change.movedim(1, 0).flatten(1).double().mean(1)
    assert float(change.square().mean()) > 1e-4
    assert float(mean.abs().max()) < 1e-4 * float(change.square().mean().sqrt())


@pytest.mark.parametrize("name", applicable({"g": 1, "o": 16, "i": 8, "p": 3, "q": 3}, by_default=True))
def test_the_bias_takes_up_the_mean_behind_a_folded_norm(name: str) -> None:
    """The change of the first layer alone, seen behind its normalisation."""
    model = random_cnn()
    generator = torch.Generator().manual_seed(1)
    data = [torch.rand(8, 3, 16, 16, generator=generator) for _ in range(2)]
    known = tdc.calibrate(model, data, progress=False)
    site = next(s for s in NnProgram(model, data[0]).sites()[0] if s.name == "0.weight")
    small = applied(model, data[0], middle(site, name, variants_of(name, site.axes)[0]), known)
    with torch.no_grad():
        change = torch.cat([small[:2](x) - model[:2](x) for x in data])
    assert type(small[1]) is nn.Identity
    mean = change.movedim(1, 0).flatten(1).double().mean(1)
    assert float(mean.abs().max()) < 1e-4 * float(change.square().mean().sqrt())


def test_the_bias_takes_up_the_mean_of_a_linear_layer() -> None:
    layer = nn.Linear(24, 16)
    x = torch.randn(4096, 24) + 1
    small = tdc.compress(nn.Sequential(layer), x, budget="params=0.5", calibration=[x], metric="input", progress=False)
    change = (small(x) - layer(x)).detach().double()
    assert float(change.mean(0).abs().max()) < 1e-4 * float(change.square().mean().sqrt())
    measured = float(change.square().mean() / (layer(x) - layer.bias).square().mean())
    assert measured == pytest.approx(tdc.report(small).sites[0].error, rel=0.02)


@pytest.mark.parametrize("keep", [0.2, 0.32, 0.38])
def test_the_loss_of_a_plan_of_small_errors_is_measured_on_other_data(keep: float) -> None:
    """Where the output looks away from what is lost first, the loss falls faster than the error: here as its square."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q for _ in range(2))
    falling = 2.0 ** -torch.arange(32) + 1e-4
    layer, head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(falling) @ right.T)
        head.weight.copy_(torch.diag(falling) @ left.T)
    model = nn.Sequential(layer, head).eval()
    data, probe, other = torch.randn(3, 512, 32, generator=generator)
    options: dict[str, Any] = {"probe": [probe], "exclude": "1.*", "allow": "svd", "allocation": "uniform"}
    options |= {"calibration": [data], "metric": "input", "progress": False}
    plan = tdc.plan(model, data[:1], budget=f"params={keep}", **options)
    small = tdc.compress(model, data[:1], plan=plan, calibration=[data], progress=False)
    with torch.no_grad():
        dense = model(other)
        measured = float((small(other) - dense).square().sum() / dense.square().sum())
    assert plan.loss / 3 < measured < 3 * plan.loss
