from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from tdc.errors import CalibrationError
from tdc.statistics import divergence


def test_nothing_moved_is_zero() -> None:
    x = torch.randn(3, 4)
    assert divergence({"y": x}, {"y": x.clone()}) == 0
    assert divergence({"logits": x}, {"logits": x.clone()}) == 0


def test_other_outputs_are_measured_by_relative_squared_error_averaged() -> None:
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0])}
    moved = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([1.0])}
    assert divergence(reference, moved) == pytest.approx((1 / 25 + 1 / 4) / 2)


def test_logits_are_measured_by_kullback_leibler_alone() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    expected = float((p * np.log(p / q)).sum())
    logits = {"logits": torch.tensor(np.log(p)) + 5, "loss": torch.tensor(1.0)}
    moved = {"logits": torch.tensor(np.log(q)) - 3, "loss": torch.tensor(9.0)}
    assert divergence(logits, moved) == pytest.approx(expected, rel=1e-6)


def test_positions_are_averaged() -> None:
    one = torch.randn(5)
    two = torch.stack([one, one + torch.tensor([1.0, 0, 0, 0, 0])])
    single = divergence({"logits": one}, {"logits": two[1]})
    assert divergence({"logits": torch.stack([one, one])}, {"logits": two}) == pytest.approx(single / 2)


def test_a_reference_of_zeros_gives_the_absolute_change() -> None:
    assert divergence({"y": torch.zeros(2)}, {"y": torch.tensor([1.0, 2.0])}) == 5


def test_no_floating_output_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no floating output"):
        divergence({}, {})


def test_rows_are_compared_in_parts_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, moved = torch.randn(3, 5, 40, generator=generator), torch.randn(3, 5, 40, generator=generator)
    whole = divergence({"logits": reference}, {"logits": moved})
    with patch("tdc.statistics.divergence._CHUNK", 80):  # two rows at a time
        assert divergence({"logits": reference}, {"logits": moved}) == pytest.approx(whole, rel=1e-6)
