"""E2: the error that a plan predicts and a report states, against the change of the layer's output on other images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_fits import change
from planning_common import add_row, figure, known_statistics, vgg11
from torch import Tensor, nn
from vgg import VGG11, cifar, load_vgg11

import tdc
from tdc import decompositions
from tdc.frontends.nn import NnProgram

__all__ = ["own_layers", "predicted_errors"]

FORMATS = [name for name in decompositions.names() if decompositions.get(name).by_default]
KEEP = 0.4
MARK = "0.95 to 1.1"


def predicted_errors() -> None:
    """Layers of all kinds with weights of VGG11's second convolution, on what that reads."""
    model = load_vgg11()
    calibration, fresh = (features(model, cifar(part, count)[0]) for part, count in (("train", 1024), ("dev", 512)))
    for name, (make, shape) in LAYERS.items():
        data, other = shape(calibration), shape(fresh)
        layer = nn.Sequential(make(model)).eval()
        known = tdc.calibrate(layer, list(data.chunk(8)), metric="input", progress=False)
        for decomposition in FORMATS:
            one_layer(name, decomposition, layer, known, other)
    for name, layer, example in unsupported():
        remarks = NnProgram(layer, example).sites()[1]
        reason = "; ".join(remark.reason for remark in remarks) or "no site"
        add_row({"experiment": "E2", "net": "one layer", "case": name, "note": f"not replaced: {reason}"})


@torch.no_grad()
def features(model: VGG11, images: Tensor) -> Tensor:
    """What the second convolution reads: (n, 64, 16, 16)."""
    return torch.cat([model.features[:4](part) for part in images.split(256)])


def conv(model: VGG11, width: int | None = None, **options: Any) -> nn.Module:
    """A convolution with the weights of the second one, of its first ``width`` inputs."""
    old = model.features[4]
    layer = nn.Conv2d(64, 128, 3, **options)
    with torch.no_grad():
        layer.weight.copy_(old.weight[:, :width])
        if layer.bias is not None:
            layer.bias.copy_(old.bias)
    return layer


def line(model: VGG11, **options: Any) -> nn.Module:
    layer = nn.Conv1d(64, 128, 3, **options)
    with torch.no_grad():
        layer.weight.copy_(model.features[4].weight[:, :, 1])
    return layer


def linear(model: VGG11) -> nn.Module:
    layer = nn.Linear(64, 128)
    with torch.no_grad():
        layer.weight.copy_(model.features[4].weight[:, :, 1, 1])
    return layer


def image(x: Tensor) -> Tensor:
    return x


def rows(x: Tensor) -> Tensor:
    """Every second row of the images as a sequence: (n 8, 64, 16)."""
    return x[:, :, ::2].movedim(2, 1).flatten(0, 1).contiguous()


def pixels(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, 2)[::4].contiguous()


LAYERS: dict[str, tuple[Callable[[VGG11], nn.Module], Callable[[Tensor], Tensor]]] = {
    "conv2d padded": (lambda m: conv(m, padding=1), image),
    "conv2d unpadded": (lambda m: conv(m), image),
    "conv2d without bias": (lambda m: conv(m, padding=1, bias=False), image),
    "conv2d stride 2": (lambda m: conv(m, padding=1, stride=2), image),
    "conv2d stride 2 and 1": (lambda m: conv(m, padding=(1, 0), stride=(2, 1)), image),
    "conv2d dilation 2": (lambda m: conv(m, padding=2, dilation=2), image),
    "conv2d groups 2": (lambda m: conv(m, 32, padding=1, groups=2), image),
    "conv2d groups 2 stride 2": (lambda m: conv(m, 32, padding=1, groups=2, stride=2), image),
    "conv2d padding same": (lambda m: conv(m, padding="same", dilation=3), image),
    "conv2d reflected": (lambda m: conv(m, padding=2, padding_mode="reflect"), image),
    "conv2d circular stride 2": (lambda m: conv(m, padding=1, padding_mode="circular", stride=2), image),
    "conv1d padded": (lambda m: line(m, padding=1), rows),
    "conv1d stride 2 dilation 2": (lambda m: line(m, padding=2, stride=2, dilation=2), rows),
    "linear": (linear, pixels),
}


def unsupported() -> list[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    return [
        ("transposed conv2d", nn.Sequential(nn.ConvTranspose2d(64, 32, 3)), (torch.randn(1, 64, 8, 8),)),
        ("lstm", nn.LSTM(64, 64, batch_first=True), (torch.randn(1, 5, 64),)),
        ("gru", nn.GRU(64, 64, batch_first=True), (torch.randn(1, 5, 64),)),
        ("rnn", nn.RNN(64, 64, batch_first=True), (torch.randn(1, 5, 64),)),
    ]


@torch.no_grad()
def one_layer(name: str, decomposition: str, layer: nn.Module, known: tdc.Statistics, other: Tensor) -> None:
    options: dict[str, Any] = {"statistics": known, "metric": "input", "progress": False}
    try:
        plan = tdc.plan(layer, other[:1], budget=f"params={KEEP}", allow=decomposition, **options)
    except tdc.BudgetError:
        return  # it has nothing that small
    small = tdc.compress(layer, other[:1], plan=plan, **options)
    (stated,) = tdc.report(small).sites
    bias = layer[0].bias
    offset = (
        0 if bias is None else bias if isinstance(layer[0], nn.Linear) else bias[(...,) + (None,) * (other.ndim - 2)]
    )
    lost = whole = 0.0
    for part in other.split(256 if other.ndim == 4 else 4096):
        dense = layer(part)
        lost += float((small(part) - dense).double().square().sum())
        whole += float((dense - offset).double().square().sum())
    (choice,) = plan.choices
    written(f"{name}, {decomposition}", "one layer", choice.error, stated.error, lost / whole)


def written(case: str, net: str, planned: float, stated: float, measured: float) -> None:
    row = {"experiment": "E2", "net": net, "case": case, "predicted": figure(planned), "stated": figure(stated)}
    ratios = {"ratio": f"{measured / planned:.3f}", "ratio to stated": f"{measured / stated:.3f}"}
    add_row({**row, "measured": figure(measured), **ratios, "pass mark": MARK})


def own_layers(cache: Path | None) -> None:
    """VGG11's own layers, as plans for three budgets cut them."""
    case = vgg11(2048, 512)
    known = known_statistics(case, cache)
    for budget in ("params=0.5", "params=0.2", "params=0.1"):
        options: dict[str, Any] = {"statistics": known, "metric": "input", "progress": False}
        plan = tdc.plan(case.model, case.held_out[:4], budget=budget, **options)
        small = tdc.compress(case.model, case.held_out[:4], plan=plan, **options)
        stated = {site.name: site.error for site in tdc.report(small).sites}
        for choice in plan.choices:
            if not choice.is_dense:
                path = choice.site.name.removesuffix(".weight")
                measured = change(case.model, path, small.get_submodule(path), case.held_out)
                what = f"{choice.site.name} at {budget}, {choice.decomposition}"
                written(what, "vgg11", choice.error, stated[choice.site.name], measured)
