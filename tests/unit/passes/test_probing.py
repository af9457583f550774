"""Sensitivities of models with many sites."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import NnProgram
from tdc.passes import calibrate as module

BLOCKS = 24
SCALE = torch.logspace(0, -2, 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.down(torch.tanh(self.up(x)) * self.gate(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).eval()


def calibrated(monkeypatch: pytest.MonkeyPatch, many: int) -> tuple[tdc.Statistics, int]:
    """The statistics, and how many forward runs with a changed weight they took."""
    runs = 0
    real = NnProgram.outputs

    def counting(self: NnProgram, batch: Any, changes: Any) -> Any:
        nonlocal runs
        runs += bool(changes)
        return real(self, batch, changes)

    with monkeypatch.context() as patch:
        patch.setattr(NnProgram, "outputs", counting)
        patch.setattr(module, "_MANY", many)
        data = [torch.randn(256, 32, generator=torch.Generator().manual_seed(k)) * SCALE for k in range(4)]
        return tdc.calibrate(model(), data, progress=False), runs


def test_of_many_sites_some_are_probed_at_all_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    (few, runs), (all_of_them, most) = (calibrated(monkeypatch, many) for many in (64, 1000))
    sites = 3 * BLOCKS
    assert most > 2.5 * sites
    assert runs <= 24 * 5 + sites + 2 * BLOCKS < most
    for error in (3e-5, 3e-4, 3e-3, 0.03, 0.3):
        ratios = [
            a.sensitivity_at(error) / b.sensitivity_at(error) for a, b in zip(few.sites, all_of_them.sites, strict=True)
        ]
        ordered = sorted(ratios)
        assert 0.8 < ordered[sites // 2] < 1.25
        spread = 2.5 if error < 1e-4 else 2
        assert ordered[sites // 10] > 1 / spread
        assert ordered[-sites // 10] < spread
    exact = [k for k, e in enumerate(few.sites) if {*e.probes} <= {*all_of_them.sites[k].probes}]
    assert exact == list(range(0, sites, 3))


def test_where_the_sensitivity_is_steep_there_are_more_probes() -> None:
    """A head of ten directions that the output sees, and others that it hardly does, of falling strength."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] for _ in range(2))
    first, last = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
    with torch.no_grad():
        first.weight.copy_(left @ torch.diag(torch.logspace(0, -1, 24)) @ right.T)
        last.weight.copy_(torch.diag((torch.arange(24) < 10).float() + 1e-3) @ left.T)
    known = tdc.calibrate(
        nn.Sequential(first, last), [torch.randn(400, 24, generator=generator)], progress=False, metric="input"
    )
    probes = known.sites[0].probes
    assert len(module.PROBE_ERRORS) < len(probes) <= module._MOST
    assert [error for error, _ in probes] == sorted({error for error, _ in probes})
    steps = [max(a, b) / min(a, b) for (_, a), (_, b) in itertools.pairwise(probes)]
    assert max(steps) > module._STEEP  # the ranks at the edge follow each other
    edge = float(torch.logspace(0, -2, 24)[10:].sum() / torch.logspace(0, -2, 24).sum())
    assert any(0.7 * edge < error < 1.3 * edge for error, _ in probes)
