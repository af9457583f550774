"""What real architectures have: sums of branches, heads of few outputs, lengths from the data, memory formats."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import ModelError

WIDTH = 64


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Branches(nn.Module):
    """A block whose output is the sum of two branches, each with its normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.bn = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.an(self.a(x)) + self.bn(self.b(x)))


class Inverted(nn.Module):
    """An inverted residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.n1 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.deep = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False)
        self.n2, self.out = nn.BatchNorm2d(4 * width), nn.Conv2d(4 * width, width, 1, bias=False)
        self.n3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.n2(self.deep(torch.relu(self.n1(self.into(x))))))
        return x + self.n3(self.out(y))


def convolutional(*middle: nn.Module, width: int) -> nn.Sequential:
    """With running statistics of its own, like a trained one."""
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    net = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), *middle, *ends).train()
    with torch.no_grad():
        for _ in range(30):
            net(torch.randn(16, 3, 24, 24))
    return net.eval()


@pytest.mark.parametrize(
    ("block", "count", "width", "budget"), [(Branches, 2, 32, "params=0.8"), (Inverted, 3, 24, "params=0.3")]
)
def test_anchored_fits_are_no_worse_and_keep_the_budget(
    block: type[nn.Module], count: int, width: int, budget: str
) -> None:
    torch.manual_seed(0)
    model = convolutional(*(block(width) for _ in range(count)), width=width)
    data, x = [torch.randn(8, 3, 24, 24) for _ in range(6)], torch.randn(64, 3, 24, 24)
    statistics = tdc.calibrate(model, data, progress=False)
    keywords: dict[str, Any] = {"budget": budget, "statistics": statistics, "progress": False}
    keywords |= {"allow": ("pivoted", "svd"), "allocation": "uniform"} if block is Branches else {}
    lost = []
    for calibration in (data, None):
        small = tdc.compress(model, data[0], calibration=calibration, **keywords)
        report = tdc.report(small)
        assert report.after.params <= float(budget.partition("=")[2]) * report.before.params
        with torch.no_grad():
            lost.append(apart(small(x), model(x)))
    assert lost[0] <= lost[1]


@pytest.mark.parametrize("outputs", [(3, 12), (12, 3), (2, 2)])
def test_heads_of_few_outputs_on_one_input(outputs: tuple[int, int]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(WIDTH, WIDTH)
            self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in outputs)

        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = torch.relu(self.trunk(x))
            return [head(hidden) for head in self.heads]

    torch.manual_seed(0)
    small = tdc.compress(Heads().eval(), budget="params=0.5", calibration=[torch.randn(64, WIDTH)], progress=False)
    assert tdc.report(small).after.params <= 0.5 * tdc.report(small).before.params


def test_lengths_that_follow_from_the_data() -> None:
    class Durations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.count = nn.Embedding(40, 32), nn.Linear(32, 1)
            self.conv, self.out = nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            times = (self.count(x).squeeze(-1).sigmoid() * 4).round().long() + 1
            longer = torch.repeat_interleave(x[0], times[0], dim=0)[None].transpose(1, 2)
            out: Tensor = self.out(self.conv(longer).transpose(1, 2))
            return out

    torch.manual_seed(0)
    data = [torch.randint(0, 40, (1, 12)) for _ in range(6)]
    assert tdc.report(tdc.compress(Durations().eval(), budget="params=0.6", calibration=data, progress=False)).replaced


def test_gradients_that_vanish_leave_the_metric_of_the_inputs() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 16)]
    for _ in range(5):
        layer = nn.Linear(16, 16)
        with torch.no_grad():
            layer.weight.mul_(3e-5)
        layers += [layer, nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 8)).eval()
    statistics = tdc.calibrate(model, [torch.randn(64, 16) for _ in range(4)], progress=False)
    assert len(statistics.sites) == 7
    assert all(bool(torch.isfinite(gradient).all()) for gradient in statistics.gradients)


def test_a_loaded_model_is_in_the_memory_format_of_the_architecture(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        return nn.Sequential(*convolutions).eval().to(memory_format=torch.channels_last)

    x = torch.randn(1, 3, 24, 24)
    small = tdc.compress(made(), budget="params=0.6", calibration=[torch.randn(4, 3, 24, 24)], progress=False)
    tdc.save(small, tmp_path / "small.tdc")
    loaded = tdc.load(tmp_path / "small.tdc", made())
    for old, new in zip(small.parameters(), loaded.parameters(), strict=True):
        assert old.stride() == new.stride()
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


def test_tensors_that_a_forward_leaves_behind_can_be_copied(tmp_path: Path) -> None:
    """Weights that old parametrizations compute on every call have a graph."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            first = nn.utils.weight_norm(nn.Conv1d(8, 24, 3, padding=1))
        return nn.Sequential(first, nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1)).eval()

    x = torch.randn(4, 8, 30)
    small = tdc.compress(made(), budget="params=0.6", calibration=[x], progress=False)
    tdc.save(small, tmp_path / "small.tdc")
    assert torch.equal(tdc.load(tmp_path / "small.tdc", made())(x), small(x))
    assert apart(tdc.densify(small)(x), small(x)) < 1e-5


def test_healing_of_a_model_that_cannot_run_backwards() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.sigmoid(self.a(x))
            out: Tensor = self.b(hidden)
            hidden.mul_(0.5)  # what the gradient needs
            return out + hidden

    data = [torch.randn(64, WIDTH) for _ in range(4)]
    small = tdc.compress(State().eval(), budget="params=0.5", calibration=data, progress=False)
    with pytest.raises(ModelError, match="backwards"):
        tdc.heal(small, State().eval(), data, config=tdc.Heal(epochs=1), progress=False)
