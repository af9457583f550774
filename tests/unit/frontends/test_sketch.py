from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc.frontends.program import head, passed_over_weight, sketch
from tdc.ir import same_weight
from tdc.testing import random_site


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recognised(a: torch.Tensor, b: torch.Tensor) -> bool:
    return same_weight(random_site(a), dataclasses.replace(random_site(b), dtype="float64"))


@settings(max_examples=40)
@given(rows=st.integers(4, 40), columns=st.integers(4, 40), seed=st.integers(0, 99))
def test_scaling_the_rows_does_not_move_a_sketch(rows: int, columns: int, seed: int) -> None:
    weight = gaussian(rows, columns, seed)
    scale = torch.logspace(-20, 20, rows, dtype=torch.float64) * torch.sign(gaussian(rows, 1, seed + 1))[:, 0]
    assert sketch(weight * scale[:, None]) == pytest.approx(sketch(weight), abs=2e-6)


@settings(max_examples=40)
@given(rows=st.integers(8, 64), columns=st.integers(8, 64), seed=st.integers(0, 99))
def test_rounding_to_half_precision_keeps_a_weight_recognisable(rows: int, columns: int, seed: int) -> None:
    weight = gaussian(rows, columns, seed)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert recognised(weight, weight.to(dtype))


def test_the_stored_order_does_not_count() -> None:
    weight = gaussian(12, 8)
    assert sketch(weight.T.contiguous().T) == sketch(weight)


@settings(max_examples=60)
@given(rows=st.integers(8, 40), columns=st.integers(8, 40), seed=st.integers(0, 99))
def test_different_weights_have_different_sketches(rows: int, columns: int, seed: int) -> None:
    assert not recognised(gaussian(rows, columns, seed), gaussian(rows, columns, seed + 1000))


def test_a_permutation_of_rows_or_columns_is_another_weight() -> None:
    weight = gaussian(16, 12)
    assert not recognised(weight, weight.flip(0))
    assert not recognised(weight, weight.flip(1))


def test_a_large_weight_is_sketched_in_parts_like_a_whole() -> None:
    from tdc.frontends import program

    weight, whole = gaussian(64, 16), sketch(gaussian(64, 16))
    old, program._CHUNK = program._CHUNK, 100
    try:
        assert sketch(weight) == pytest.approx(whole, abs=2e-6)
    finally:
        program._CHUNK = old


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e160, 1e-160])
def test_extreme_scales_do_not_move_a_sketch(scale: float) -> None:
    assert sketch(gaussian(12, 8) * scale) == pytest.approx(sketch(gaussian(12, 8)), abs=2e-6)


@pytest.mark.parametrize("bad", [torch.zeros(0, 4), torch.zeros(4, 0), torch.full((2, 2), float("nan"))])
def test_a_weight_without_finite_entries_has_no_sketch(bad: torch.Tensor) -> None:
    assert sketch(bad) == ()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(0, 4), "the weight of shape [0, 4] has no entries"),
        (torch.ones(2, 2, dtype=torch.int8), "the weight has dtype int8, not a real floating one"),
        (torch.ones(2, 2, dtype=torch.complex64), "the weight has dtype complex64, not a real floating one"),
        (torch.tensor([[1.0, float("inf")]]), "1 of 2 entries of the weight are NaN or infinite"),
        (torch.ones(2, 2), ""),
    ],
)
def test_why_a_weight_is_passed_over(weight: torch.Tensor, reason: str) -> None:
    assert passed_over_weight(weight) == reason


def test_the_head_of_a_batch_is_taken_of_every_array_in_it() -> None:
    x = torch.arange(6).reshape(3, 2)
    short = head({"a": (x, [x.numpy()]), "b": 3, "c": torch.tensor(5)}, 2)
    assert torch.equal(short["a"][0], x[:2])
    assert short["a"][1][0].tolist() == [[0, 1], [2, 3]]
    assert short["b"] == 3
    assert int(short["c"]) == 5
