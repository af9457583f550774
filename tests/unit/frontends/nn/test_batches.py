from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc.errors import CalibrationError
from tdc.frontends.nn.batches import as_call, as_calls


class Takes(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class TakesAny(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


X, Y, Z = torch.zeros(1), torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "args", "names"),
    [
        (X, (X,), ()),
        ((X,), (X,), ()),
        ([X, Y], (X, Y), ()),
        ((X, Y, Z), (X, Y), ()),
        ({"x": X, "y": 3}, (), ("x", "y")),
    ],
)
def test_a_batch_becomes_arguments_and_keywords(batch: Any, args: tuple[Any, ...], names: tuple[str, ...]) -> None:
    found, keywords = as_call(Takes(), batch)
    assert len(found) == len(args)
    assert all(torch.equal(a, b) for a, b in zip(found, args, strict=True))
    assert tuple(keywords) == names


def test_what_the_example_did_not_give_is_dropped() -> None:
    assert len(as_call(Takes(), (X, Y), positional=1)[0]) == 1
    assert len(as_call(TakesAny(), (X, Y, Z))[0]) == 3


@pytest.mark.parametrize(
    ("batch", "text"), [(3, "got int"), ("x", "got str"), (None, "got NoneType"), ((), "empty"), ({}, "empty")]
)
def test_what_is_no_batch_is_refused(batch: Any, text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        as_call(Takes(), batch)


def test_one_tensor_or_mapping_is_one_batch() -> None:
    assert len(list(as_calls(Takes(), X))) == len(list(as_calls(Takes(), {"x": X}))) == 1
    assert len(list(as_calls(Takes(), iter([X, Y])))) == 2


@pytest.mark.parametrize("given", [3, "text", b"bytes", None])
def test_what_is_no_row_of_batches_is_refused(given: Any) -> None:
    with pytest.raises(CalibrationError, match="iterable of batches"):
        list(as_calls(Takes(), given))
