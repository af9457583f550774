"""The check that calibration has seen enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdc
from tdc.statistics import Statistics


def remarks(rows: int, batches: int, bias: bool = True) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, generator=generator)
    data = torch.randn(rows, 48, generator=generator) @ mix
    layer = nn.Linear(48, 32, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 48, generator=generator))
    known: Statistics = tdc.calibrate(nn.Sequential(layer).eval(), list(data.chunk(batches)), progress=False)
    return [remark.reason for remark in known.remarks if "too little calibration data" in remark.reason]


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_found_out_by_the_other_half(bias: bool) -> None:
    (reason,) = remarks(96, 4, bias)
    assert "1 of the 1 site(s)" in reason
    assert float(reason.split("up to ")[1].split(" times")[0]) > 1.5


@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_pass(bias: bool) -> None:
    assert remarks(9600, 5, bias) == []


def test_one_batch_has_no_halves() -> None:
    assert remarks(96, 1) == []


def test_convolutions_are_checked_too() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 6, 5, 5, generator=generator)
    layer = nn.Sequential(nn.Conv2d(6, 16, 3)).eval()
    known = tdc.calibrate(layer, list(images.split(1)), progress=False)
    assert any("too little calibration data" in remark.reason for remark in known.remarks)
    more = torch.randn(400, 6, 5, 5, generator=generator)
    known = tdc.calibrate(layer, list(more.split(100)), progress=False)
    assert not any("too little calibration data" in remark.reason for remark in known.remarks)
