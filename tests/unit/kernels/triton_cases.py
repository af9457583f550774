"""What the Triton kernels must compute. Run by test_triton.py, in Triton's interpreter on the processor (which is
chosen before triton is imported, hence a process of its own), and on a GPU where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc.kernels.c.two_products import reference
from tdc.kernels.triton import few_rows, joint_products, three_convolutions, two_products, windows
from tdc.kernels.triton.few_rows import Tiling
from tdc.kernels.triton.windows import Window2, Windows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
"""The interpreter multiplies the bits of bfloat16 matrices."""
FORMS = ("plain", "gather before", "stacked", "gather behind", "both")
SIZES = ((33, 40, 8), (70, 130, 31))
"""(outputs, inputs, rank)."""
ROUNDING = 2.0

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def operands(form: str, sizes: tuple[int, int, int], rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, first, second, bias, order, place, stacked."""
    o, i, r = sizes
    before, stacked = form in ("gather before", "both"), form in ("stacked", "gather behind", "both")
    return (
        some(rows, i, dtype=dtype),
        some(r, i - r if before else i, dtype=dtype),
        some(o - r if stacked else o, r, dtype=dtype),
        some(o, dtype=dtype),
        torch.randperm(i, device=DEVICE).int() if before else None,
        torch.randperm(o, device=DEVICE).int() if form in ("gather behind", "both") else None,
        stacked,
    )


def raised(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor of real numbers changed."""
    if isinstance(given, list | tuple):
        return type(given)(raised(one, change) for one in given)
    return change(given) if isinstance(given, Tensor) and given.is_floating_point() else given


def assert_as_good(found: Tensor, call: Callable[..., Tensor], given: tuple[Any, ...]) -> None:
    """No farther from the exact result than twice as far as torch's own, beside one rounding of the terms."""
    right = call(*raised(given, Tensor.double))
    terms = call(*raised(raised(given, Tensor.double), Tensor.abs)).norm().item()
    ours, theirs = ((y.double() - right).norm().item() / terms for y in (found, call(*given)))
    assert found.shape == right.shape
    assert found.dtype is given[0].dtype
    assert ours <= ROUNDING * theirs + torch.finfo(found.dtype).eps / 2, f"{ours:.2e}, torch {theirs:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "by"), [(1, "few"), (3, "few"), (64, "few"), (3, "many")])
def test_two_products(form: str, rows: int, by: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        given = operands(form, sizes, rows, dtype)
        found = two_products.run(*given, by=by)
        assert_as_good(found, reference, given)
        assert torch.equal(found, two_products.run(*given, by=by)), "the same at every call"


def test_what_is_few_follows_from_rows_factors_and_type(dtype: torch.dtype) -> None:
    small, large = (torch.empty(n, 1024, dtype=dtype, device="meta") for n in (1000, 20000))
    found = [two_products.few(rows, small, large) for rows in (1, 2, 16, 17)]
    assert found == ["few", *["many" if dtype is torch.float32 else "few"] * 2, "many"]
    assert two_products.few(32, small, small) == ("many" if dtype is torch.float32 else "few")
    assert two_products.few(33, small, small) == "many"


@pytest.mark.parametrize(("rows", "split"), [(1, 1), (1, 3), (5, 2), (5, 4)])
def test_parts_of_the_columns_are_added(rows: int, split: int, dtype: torch.dtype) -> None:
    for outputs, inputs in ((16, 32), (37, 130)):
        x, w, b = some(rows, inputs, dtype=dtype), some(outputs, inputs, dtype=dtype), some(outputs, dtype=dtype)
        for n, k in ((16, 32), (32, 16)):
            tile = Tiling(1 if rows == 1 else 16, n, k, split, 4, 2)
            found = few_rows.product(x, w, b, tile=tile)
            assert_as_good(found, torch.nn.functional.linear, (x, w, b))
            assert torch.equal(found, few_rows.product(x, w, b, tile=tile, early=True))


def test_leading_axes_strides_and_empty_sizes(dtype: torch.dtype) -> None:
    x, *others = given = operands("both", SIZES[1], 6, dtype)
    right = two_products.run(*given)
    assert torch.equal(two_products.run(x.reshape(2, 1, 3, -1), *others), right.reshape(2, 1, 3, -1))
    assert torch.equal(two_products.run(x.T.contiguous().T, others[0].T.contiguous().T, *others[1:]), right)
    assert_as_good(two_products.run(x[0], *others), reference, (x[0], *others))
    assert two_products.run(x[:0], *others).shape == (0, 70)
    for sizes in ((5, 4, 0), (0, 4, 2), (5, 0, 0)):
        empty = operands("plain", sizes, 3, dtype)
        assert torch.equal(two_products.run(*empty), reference(*empty))
    whole = operands("gather before", (9, 9, 9), 3, dtype)
    assert_as_good(two_products.run(*whole), reference, whole)


@pytest.mark.parametrize("wrong", [-1, 130, 2**31 - 1])
def test_an_index_out_of_range_gives_no_number(wrong: int, dtype: torch.dtype) -> None:
    for rows in (1, 4):
        x, first, second, bias, order, place, stacked = operands("both", SIZES[1], rows, dtype)
        order[40] = wrong
        assert two_products.run(x, first, second, bias, order, place, stacked).isnan().any()
        order[40], place[7] = order[41], wrong
        found = two_products.run(x, first, second, bias, order, place, stacked)
        assert found.isnan().nonzero()[:, 1].tolist() == [7] * rows


def test_one_product(dtype: torch.dtype) -> None:
    for rows in (1, 7, 70):
        given = some(2, rows, 40, dtype=dtype), some(33, 40, dtype=dtype), some(33, dtype=dtype)
        assert_as_good(two_products.one_product(*given), torch.nn.functional.linear, given)
        assert_as_good(two_products.one_product(*given[:2]), torch.nn.functional.linear, given[:2])


@pytest.mark.parametrize("rows", [1, 6])
def test_joint_products(rows: int, dtype: torch.dtype) -> None:
    x, first = some(rows, 40, dtype=dtype), some(9, 40, dtype=dtype)
    seconds, biases = [some(n, 9, dtype=dtype) for n in (7, 33)], [some(n, dtype=dtype) for n in (7, 33)]
    for given in ((x, first, seconds, biases), (x, first, seconds, [])):
        for k, found in enumerate(joint_products.run(*given)):
            assert_as_good(found, lambda *operands, k=k: joint_products.reference(*operands)[k], given)


CONVOLUTIONS = (
    ((2, 20, 5, 5), 9, (13, 3, 3), 30, (1, 1), (1, 1)),
    ((1, 33, 9, 6), 8, (17, 3, 3), 70, (2, 2), (1, 1)),
    ((1, 8, 6, 5), 4, (41, 5, 5), 8, (1, 1), (2, 2)),
    ((1, 16, 8, 11), 16, (20, 3, 1), 16, (1, 2), (0, 1)),
)
"""x, first channels, (second channels, taps), outputs, stride, padding."""


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("by", three_convolutions.METHODS)
def test_three_convolutions(case: tuple[Any, ...], by: str, dtype: torch.dtype) -> None:
    shape, r, (s, *taps), o, stride, padding = case
    x = some(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    core, last = some(s, r, *taps, dtype=dtype) / (3 * r**0.5), some(o, s, dtype=dtype) / s**0.5
    given = (x, some(r, shape[1], dtype=dtype), core, last, some(o, dtype=dtype), stride, padding)
    found = three_convolutions.run(*given, by=by)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_good(found, three_convolutions.reference, given)
    bare = (*given[:4], None, stride, padding)
    assert_as_good(three_convolutions.run(*bare), three_convolutions.reference, bare)


@pytest.mark.parametrize("tile", [Windows(16, 16, 16, 2, 4, 2), Windows(32, 32, 32, 1, 4, 2)], ids=str)
def test_tiles_of_convolutions_cover_everything(tile: Windows, dtype: torch.dtype) -> None:
    x, v, core = some(1, 7, 6, 8, dtype=dtype), some(5, 8, dtype=dtype), some(20, 3, 3, 5, dtype=dtype)
    u, window = some(40, 20, dtype=dtype), Window2((3, 3), (2, 1), (1, 1))

    def exact(*given: Tensor) -> Tensor:
        x, v, core, u = given
        y = three_convolutions.reference(x.permute(0, 3, 1, 2), v, core.permute(0, 3, 1, 2), u, None, (2, 1), (1, 1))
        return y.permute(0, 2, 3, 1)

    for first in (None, x @ v.T):
        assert_as_good(windows.windows(x, v, core, u, None, window, tile, first), exact, (x, v, core, u))
