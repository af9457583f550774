"""One run forwards and backwards gives the statistics that two runs give."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import NnProgram, reads
from tdc.ir import Site
from tdc.statistics import Probe
from tdc.testing import random_cnn


class Branches(nn.Module):
    """Two layers that read the same, a ring-padded convolution, and an addition, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.left, self.right, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.stem(x).relu().flatten(2).mT
        y = self.left(x) * self.right(x).sigmoid()
        x = x.add_(y) if self.inplace else x + y  # x was read by left and right
        return self.last(x).mean(1)


def statistics_of(model: nn.Module, data: list[Tensor]) -> tdc.Statistics:
    return tdc.calibrate(model.eval(), data, progress=False)


def assert_same(found: tdc.Statistics, wanted: tdc.Statistics) -> None:
    """Up to rounding: a layer may multiply in another order where gradients are wanted."""
    assert [(e.site, e.rows, e.moment, e.gradient) for e in found.sites] == [
        (e.site, e.rows, e.moment, e.gradient) for e in wanted.sites
    ]
    for own, other in zip(found.moments + found.gradients, wanted.moments + wanted.gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_are_those_of_a_run_of_its_own_even_where_inputs_are_written_to(inplace: bool) -> None:
    torch.manual_seed(0)
    model, data = Branches(inplace), [torch.randn(4, 3, 6, 6) for _ in range(3)]
    found, calls = statistics_of(model, data), model.calls
    with patch.object(reads, "_BYTES", 0):
        wanted = statistics_of(model, data)
    assert_same(found, wanted)
    saved = model.calls - 2 * calls  # of the runs without what was read
    assert saved == (0 if inplace else len(data))


class Loop(nn.Module):
    """One layer that runs many times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(30):
            x = torch.tanh(self.layer(x))
        return x


def test_what_was_handed_on_is_let_go() -> None:
    program = NnProgram(Loop().eval(), (torch.randn(4, 6),))
    met: list[weakref.ref[Tensor]] = []
    alive = []

    def read(site: Site, activation: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in met[:-1]))
        met.append(weakref.ref(activation))

    sites, x = program.sites()[0], torch.randn(4, 6)
    loss = Probe(None, 1)
    assert program.gradients(((x,), {}), sites, loss, lambda site, gradient: None, read) == ""
    assert len(met) == 30
    assert max(alive) <= 1  # the batch itself, which the caller holds


def test_a_site_behind_a_normalisation_and_one_run_twice() -> None:
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    for model, data in (
        (random_cnn(), torch.randn(8, 3, 16, 16)),
        (nn.Sequential(nn.Linear(5, 6), twice, nn.ReLU(inplace=True), twice), torch.randn(30, 5)),
    ):
        found = statistics_of(model, [data, data.flip(0) * 2])
        with patch.object(reads, "_BYTES", 0):
            assert_same(found, statistics_of(model, [data, data.flip(0) * 2]))
