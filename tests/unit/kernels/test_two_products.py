from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc.kernels.c import two_products
from tdc.kernels.c.two_products import reference, run

pytestmark = pytest.mark.usefixtures("compiled")

FORMS = ("plain", "gather before", "stacked", "gather behind", "both")
SIZES = ((1, 1, 1), (3, 17, 1), (17, 3, 3), (31, 33, 17), (64, 48, 16), (100, 67, 31), (130, 257, 63), (21, 530, 5))
"""(outputs, inputs, rank)."""
LARGE = ((700, 400, 300), (1000, 333, 129))
"""Enough for several threads."""
ROWS = (*range(1, 10), 47, 48, 61, 131)
"""From 48 on the C code packs the weights."""
ROUNDING = 2.0
"""No farther from the exact result than twice as far as torch's own."""


def operands(form: str, sizes: tuple[int, int, int], rows: int = 1, *, bias: bool = True) -> tuple[Any, ...]:
    """x, first, second, bias, order, place, stacked; float32."""
    (o, i, r), made = sizes, torch.Generator().manual_seed(0)
    before, stacked = form in ("gather before", "both"), form in ("stacked", "gather behind", "both")

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    return (
        some(rows, i),
        some(r, i - r if before else i),
        some(o - r if stacked else o, r),
        some(o) if bias else None,
        torch.randperm(i, generator=made).int() if before else None,
        torch.randperm(o, generator=made).int() if form in ("gather behind", "both") else None,
        stacked,
    )


def exact(given: tuple[Any, ...]) -> Tensor:
    return reference(*[t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given])


def assert_as_good_as_torch(found: Tensor, given: tuple[Any, ...]) -> None:
    """Beside that, one rounding of the terms that are summed."""
    right = exact(given)
    terms = exact(tuple(t.abs() if isinstance(t, Tensor) else t for t in given)).norm().item() + 1e-30
    ours, theirs = ((y.double() - right).norm().item() / terms for y in (found, reference(*given)))
    assert found.shape == right.shape
    assert ours <= ROUNDING * theirs + 2**-24, f"{ours:.2e} from the exact result, torch {theirs:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("version", range(3))
def test_results_are_as_good_as_torchs(form: str, sizes: tuple[int, int, int], version: int) -> None:
    if version >= len(two_products.versions()):
        pytest.skip(f"this processor does not have {two_products.VERSIONS[version]}")
    for rows in ROWS:
        for bias in (True, False):
            given = operands(form, sizes, rows, bias=bias)
            assert_as_good_as_torch(run(*given, version=version), given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_work_and_change_no_bit(form: str, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for sizes in (*SIZES, *LARGE):
            for rows in (1, 5, 200):
                given = operands(form, sizes, rows)
                torch.set_num_threads(1)
                one = run(*given)
                torch.set_num_threads(threads)
                assert torch.equal(run(*given), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_others(form: str) -> None:
    given = operands(form, (100, 67, 31), 100)
    whole = run(*given)
    for rows in (1, 2, 3, 4, 7, 50, 71):
        torch.testing.assert_close(run(given[0][:rows], *given[1:]), whole[:rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_leading_axes_stay_and_empty_ones_are_empty(form: str) -> None:
    x, *others = operands(form, (31, 33, 17), 6)
    assert torch.equal(run(x.reshape(2, 1, 3, 33), *others), run(x, *others).reshape(2, 1, 3, 31))
    assert_as_good_as_torch(run(x[0], *others), (x[0], *others))
    assert run(x[:0], *others).shape == (0, 31)
    assert run(x.reshape(2, 3, 33)[:, :0], *others).shape == (2, 0, 31)


@pytest.mark.parametrize("form", FORMS)
def test_operands_that_are_not_contiguous_are_read_right(form: str) -> None:
    x, first, second, *others = given = operands(form, (31, 33, 17), 6)
    bias = others[0].repeat_interleave(2)[::2]
    strided = (x.T.contiguous().T, first.T.contiguous().T, second.T.contiguous().T, bias, *others[1:])
    assert not strided[0].is_contiguous()
    assert torch.equal(run(*strided), run(*given))
    wide = torch.zeros(6, 40)
    wide[:, 3:36] = x
    assert torch.equal(run(wide[:, 3:36], *given[1:]), run(*given))


@pytest.mark.parametrize("sizes", [(5, 4, 0), (0, 4, 2), (5, 0, 0)], ids=str)
def test_sizes_of_zero_are_no_crash(sizes: tuple[int, int, int]) -> None:
    given = operands("plain", sizes, 3)
    torch.testing.assert_close(run(*given), reference(*given))


def test_full_rank_gathers_leave_no_coefficients() -> None:
    for form in ("gather before", "gather behind", "stacked"):
        given = operands(form, (9, 9, 9), 3)
        assert 0 in (*given[1].shape, *given[2].shape)
        assert_as_good_as_torch(run(*given), given)


def test_numbers_that_are_not_finite_stay_so() -> None:
    for value in (float("nan"), float("inf")):
        given = operands("plain", (31, 33, 17), 2)
        given[0][1, 32] = value
        found = run(*given)
        assert found[0].isfinite().all()
        assert not found[1].isfinite().any()


@pytest.mark.parametrize("wrong", [-1, 33, 2**31 - 1])
def test_an_index_out_of_range_is_an_error(wrong: int) -> None:
    for form, place in (("gather before", 4), ("gather behind", 5)):
        given = operands(form, (33, 33, 17), 2)
        given[place][7] = wrong
        with pytest.raises(IndexError, match="out of range"):
            run(*given)


def test_an_index_that_names_an_entry_twice_is_read_as_torch_does() -> None:
    for form, place in (("gather before", 4), ("gather behind", 5)):
        given = operands(form, (33, 33, 17), 2)
        given[place][7] = given[place][8]
        assert_as_good_as_torch(run(*given), given)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(2, 9)),
        (0, torch.zeros(())),
        (0, torch.zeros(2, 33, dtype=torch.float64)),
        (1, torch.zeros(17, 16, 1)),
        (1, torch.zeros(16, 16)),
        (2, torch.zeros(31, 16)),
        (2, torch.zeros(14, 17, dtype=torch.float16)),
        (3, torch.zeros(30)),
        (3, torch.zeros(1, 31)),
        (4, torch.zeros(32, dtype=torch.int32)),
        (4, torch.zeros(33, dtype=torch.int64)),
        (5, torch.zeros(30, dtype=torch.int32)),
        (5, torch.zeros(31)),
        (6, False),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_anything_is_read(place: int, value: Any) -> None:
    given = list(operands("both", (31, 33, 17), 2))
    given[place] = value
    for call in (run, two_products.operator()):
        with pytest.raises((ValueError, RuntimeError), match=r"do not fit|dtype"):
            call(*given)


def test_what_the_c_code_does_not_take_is_refused_by_it_and_run_by_the_operator() -> None:
    given = operands("plain", (31, 33, 17), 2)
    double = tuple(t.double() if isinstance(t, Tensor) else t for t in given)
    with pytest.raises(ValueError, match="float32 on the processor"):
        run(*double)
    assert torch.equal(two_products.operator()(*double), reference(*double))
    for place in (0, 3):
        meta = list(given)
        meta[place] = meta[place].to("meta")
        with pytest.raises(ValueError, match="float32 on the processor"):
            run(*meta)
    with pytest.raises(ValueError, match="does not have version 9"):
        run(*given, version=9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_obeys_the_rules_of_torch(form: str, grad: bool) -> None:
    given = operands(form, (31, 33, 17), 3)
    for operand in given[:4]:
        operand.requires_grad_(grad)
    result = torch.library.opcheck(two_products.operator(), given)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_stock_operators(form: str, bias: bool) -> None:
    given = operands(form, (31, 33, 17), 6, bias=bias)
    given = (given[0].reshape(2, 3, 33), *given[1:])
    direction = torch.randn(2, 3, 31)

    def gradients(call: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        taken = [
            t.to(kind, copy=True).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in given
        ]
        call(*taken).backward(direction.to(kind))
        return [t.grad for t in taken if isinstance(t, Tensor) and t.grad is not None]

    ours = gradients(two_products.operator(), torch.float32)
    theirs, right = (gradients(reference, kind) for kind in (torch.float32, torch.float64))
    assert len(ours) == len(theirs) == (4 if bias else 3)
    for one, other, best in zip(ours, theirs, right, strict=True):
        distances = [((g.double() - best).norm() / best.norm()).item() for g in (one, other)]
        assert distances[0] <= ROUNDING * distances[1] + 2**-24


def test_second_derivatives_pass() -> None:
    given = operands("both", (5, 7, 3), 2)
    doubles = [t.double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]

    def call(*real: Tensor) -> Tensor:
        return two_products.operator()(*real, *given[4:])

    assert torch.autograd.gradcheck(call, doubles[:4])
    assert torch.autograd.gradgradcheck(call, doubles[:4])


def test_vmap_gives_what_the_stock_operators_give() -> None:
    x, *others = operands("both", (31, 33, 17), 6)
    call = two_products.operator()
    found = torch.vmap(lambda row: call(row, *others))(x)
    torch.testing.assert_close(found, call(x, *others))
    firsts = torch.stack([others[0], 2 * others[0]], 2)
    found = torch.vmap(lambda row, first: call(row, first, *others[1:]), in_dims=(None, 2))(x, firsts)
    torch.testing.assert_close(found[1], call(x, 2 * others[0], *others[1:]))


class Layer(nn.Module):
    """Uses the operator as a layer would."""

    def __init__(self, form: str) -> None:
        super().__init__()
        _, first, second, bias, self.order, self.place, self.stacked = operands(form, (31, 33, 17))
        self.first, self.second, self.bias = nn.Parameter(first), nn.Parameter(second), nn.Parameter(bias)
        self.call = two_products.operator()

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(torch.relu(x), self.first, self.second, self.bias, self.order, self.place, self.stacked)
        return torch.relu(y)


@pytest.mark.parametrize("form", ["plain", "both"])
def test_an_exported_module_computes_the_same(form: str) -> None:
    layer, x = Layer(form), torch.randn(4, 33)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=(({0: batch}),))
    assert "tdc.two_products" in str(program.graph)
    wide = torch.randn(9, 33)
    torch.testing.assert_close(program.module()(wide), layer(wide))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module_computes_and_trains_the_same(backend: str) -> None:
    layer, x = Layer("both"), torch.randn(4, 33)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    layer(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-4)
