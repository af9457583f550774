"""Products by the faster library, and only where the time is not what matters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tdc.frontends.nn import products
from tdc.frontends.nn.running import evaluation


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def setting_seen(timed: bool = False) -> str:
    with evaluation(nn.Identity(), timed=timed):
        return torch.get_float32_matmul_precision()


def test_they_are_as_exact_inside() -> None:
    first, second = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    exact = first.double() @ second.double()
    outside = first @ second
    with products.fast_products():
        inside = first @ second
    errors = [float((found - exact).norm() / exact.norm()) for found in (outside, inside)]
    assert max(errors) < 2e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the setting stays")
def test_models_run_with_them_unless_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_better", lambda: True)
    assert setting_seen() == "medium"
    assert setting_seen(timed=True) == "highest"
    with pytest.raises(ZeroDivisionError), products.fast_products():
        raise ZeroDivisionError


def test_where_they_are_no_better_the_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_better", lambda: False)
    assert setting_seen() == "highest"


def test_a_library_that_is_faster_but_rounds_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1.0, 0.1, 1.0, 0.1))
    monkeypatch.setattr(products, "_seconds", lambda run: next(seconds))
    assert products._is_better.__wrapped__() is True
    monkeypatch.setattr(products, "_EXACT", 1e-9)
    assert products._is_better.__wrapped__() is False


def test_a_mix_of_settings_is_left_alone() -> None:
    setting: Any = torch.backends.mkldnn
    before = setting.matmul.fp32_precision
    setting.matmul.fp32_precision = "bf16"
    try:
        with evaluation(nn.Linear(2, 2)):
            assert setting.matmul.fp32_precision == "bf16"
    finally:
        setting.matmul.fp32_precision = before
