from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tdc.kernels.c import two_products
from tdc.kernels.c.one_product import reference, run

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("outputs", [1, 3, 17, 31, 64])
@pytest.mark.parametrize("inputs", [1, 3, 17, 31, 64, 133, 519])
def test_results_are_as_good_as_torchs(outputs: int, inputs: int) -> None:
    for version in range(len(two_products.versions())):
        for rows in (*range(1, 10), 48, 77):
            x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
            right = functional.linear(x.double(), weight.double(), bias.double())
            terms = functional.linear(x.abs(), weight.abs(), bias.abs()).norm().item()
            ours, theirs = (
                ((y.double() - right).norm() / terms).item()
                for y in (run(x, weight, bias, version=version), functional.linear(x, weight, bias))
            )
            assert ours <= 2 * theirs + 2**-23  # a rounding of each product and one of each sum
            torch.testing.assert_close(
                run(x, weight, version=version), functional.linear(x, weight), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("outputs", [1, 3, 17, 64])
@pytest.mark.parametrize("inputs", [0, 1, 17, 133, 519])
def test_results_behind_a_gather_are_as_good_as_torchs(outputs: int, inputs: int) -> None:
    order = torch.randperm(inputs + outputs).int()
    for version in range(len(two_products.versions())):
        for rows in (1, 2, 3, 5, 8, 48, 77):
            x, weight, bias = torch.randn(rows, inputs + outputs), torch.randn(outputs, inputs), torch.randn(outputs)
            right = reference(x.double(), weight.double(), bias.double(), order)
            terms = reference(x.double().abs(), weight.double().abs(), bias.double().abs(), order).norm().item()
            found = (run(x, weight, bias, order, version=version), reference(x, weight, bias, order))
            ours, theirs = (((y.double() - right).norm() / terms).item() for y in found)
            assert ours <= 2 * theirs + 2**-23  # a rounding of each product and one of each sum
            plain = run(x, weight, None, order, version=version)
            torch.testing.assert_close(plain, reference(x, weight, None, order), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, 33, 2**31 - 1])
def test_an_index_out_of_range_is_an_error(wrong: int) -> None:
    order = torch.randperm(33).int()
    order[20] = wrong
    with pytest.raises(IndexError, match="out of range"):
        run(torch.randn(2, 33), torch.randn(7, 26), None, order)


@pytest.mark.parametrize("order", [torch.zeros(32, dtype=torch.int32), torch.zeros(33, dtype=torch.int64)])
def test_an_order_that_does_not_fit_is_refused(order: Tensor) -> None:
    with pytest.raises(ValueError, match="shapes"):
        run(torch.randn(2, 33), torch.randn(7, 26), None, order)


def test_threads_change_no_bit() -> None:
    weight, before = torch.randn(1000, 300), torch.get_num_threads()
    try:
        for rows in (3, 100):
            x = torch.randn(rows, 300)
            torch.set_num_threads(1)
            one = run(x, weight)
            torch.set_num_threads(3)
            assert torch.equal(run(x, weight), one)
    finally:
        torch.set_num_threads(before)


def test_leading_axes_strides_and_empty_ones() -> None:
    x, weight, bias = torch.randn(2, 5, 33), torch.randn(7, 33), torch.randn(7)
    right = functional.linear(x, weight, bias)
    torch.testing.assert_close(run(x, weight.T.contiguous().T, bias), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(x.mT.contiguous().mT, weight, bias), right, rtol=1e-4, atol=1e-4)
    assert run(x[:, :0], weight).shape == (2, 0, 7)
    assert run(x, weight[:0]).shape == (2, 5, 0)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "reason"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 5), None, "shapes"),
        (torch.zeros(()), torch.zeros(3, 5), None, "shapes"),
        (torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2), "shapes"),
        (torch.zeros(2, 5).double(), torch.zeros(3, 5), None, "float32"),
        (torch.zeros(2, 5), torch.zeros(3, 5).half(), None, "float32"),
        (torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(3).double(), "float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x: Tensor, weight: Tensor, bias: Tensor | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(x, weight, bias)
    with pytest.raises(ValueError, match="version 9"):
        run(torch.zeros(2, 5), torch.zeros(3, 5), version=9)
