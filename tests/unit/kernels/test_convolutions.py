from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc import kernels
from tdc.ir import Block, Decline, Equation, Op, OpKind, Window
from tdc.kernels.base import Windows
from tdc.kernels.c import convolutions, two_products
from tdc.kernels.c.convolutions import reference, run

THREE, ONE = (Window("p", 3, 1, 1, 1, 1), Window("q", 3, 1, 1, 1, 1)), (Window("p"), Window("q"))
CONV = Block(
    (("v", (7, 5, 3, 3)), ("u", (6, 7))),
    (
        Op("conv", "t0", ("x", "v"), Equation.parse("b g i p q, (g r) i p q -> b g r"), windows=THREE),
        Op("conv", "t1", ("t0", "u"), Equation.parse("b g r, (g o) r -> b g o"), windows=ONE),
    ),
    "t1",
    (("g", 1), ("o", 6), ("i", 5), ("p", 3), ("q", 3), ("r", 7)),
    kind=OpKind.CONV2D,
)

pytestmark = pytest.mark.usefixtures("compiled")


def slides(down: int, across: int, stride: tuple[int, int] = (1, 1), pad: tuple[int, ...] = ()) -> tuple[Window, ...]:
    """Windows of that many taps; ``pad``: top, bottom, left, right (default: half the window)."""
    top, bottom, left, right = pad or (down // 2, down // 2, across // 2, across // 2)
    return Window("p", down, stride[0], 1, top, bottom), Window("q", across, stride[1], 1, left, right)


def dilated(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    return tuple(replace(window, dilation=2) for window in windows)


ONE = slides(1, 1)
CHAINS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Windows]] = {
    "channels, window, channels": ((2, 9, 14, 14), (8, 12, 17), (ONE, slides(3, 3), ONE)),
    "the same with a stride": ((3, 5, 15, 12), (9, 16, 33), (ONE, slides(3, 3, (2, 2)), ONE)),
    "one position": ((1, 24, 1, 1), (8, 8, 24), (ONE, slides(3, 3), ONE)),
    "7 x 7": ((5, 32, 7, 7), (16, 16, 24), (ONE, slides(3, 3), ONE)),
    "down, across": ((2, 6, 17, 9), (13, 8), (slides(3, 1), slides(1, 3))),
    "with other strides": ((2, 6, 17, 9), (13, 8), (slides(5, 1, (3, 1)), slides(1, 4, (1, 2), (0, 0, 2, 1)))),
    "window, channels": ((2, 3, 23, 19), (21, 5), (slides(7, 7, (2, 2)), ONE)),
    "channels, window": ((2, 3, 11, 19), (5, 4), (ONE, slides(2, 3, (1, 2), (1, 0, 0, 2)))),
    "windows all": ((1, 4, 20, 20), (6, 5, 8, 3), (slides(3, 3), slides(3, 3, (2, 1)), slides(5, 1), slides(2, 2))),
    "a window in the zeros": ((1, 3, 2, 3), (4, 5), (ONE, slides(2, 2, (3, 3), (4, 4, 5, 5)))),
    "only one": ((2, 7, 10, 10), (9,), (slides(3, 3),)),
    "a stride without a window": ((2, 7, 9, 10), (9, 4), (slides(1, 1, (2, 2)), ONE)),
    "bands": ((2, 40, 90, 80), (40, 24, 30), (ONE, slides(3, 3), ONE)),
    "bands with a stride": ((1, 40, 91, 80), (40, 24, 30), (slides(3, 3), slides(3, 3, (2, 2)), ONE)),
    "deep, small images": ((7, 70, 3, 3), (130, 40), (slides(3, 3), ONE)),
    "images of 4 and one output": ((9, 300, 2, 2), (1, 35), (ONE, slides(2, 2, (2, 2), (0, 0, 0, 0)))),
    "as many positions in another shape": ((5, 4, 4, 9), (8, 6, 5), (ONE, slides(1, 4, (1, 1), (1, 1, 0, 0)), ONE)),
    "fewer columns, more rows": ((5, 1, 4, 9), (8,), (slides(1, 4, (1, 1), (1, 1, 0, 0)),)),
    "by two": ((4, 20, 14, 14), (24, 33), (slides(3, 3, (2, 2)), ONE)),
    "by two along rows": ((3, 6, 15, 13), (9, 8), (ONE, slides(2, 5, (1, 2)))),
    "by two down": ((3, 6, 15, 40), (9, 8), (ONE, slides(3, 3, (2, 1)))),
    "by two, all in the zeros": ((1, 3, 3, 2), (4, 5), (ONE, slides(2, 2, (2, 2), (4, 4, 5, 5)))),
    "by two, a large input": ((5, 40, 75, 80), (24, 33), (slides(3, 3, (2, 2)), ONE)),
    "by three": ((2, 5, 20, 23), (9, 7), (slides(3, 3, (3, 3)), ONE)),
    "a large window": ((2, 3, 35, 35), (16, 8), (slides(11, 11, (4, 4), (2, 2, 2, 2)), ONE)),
    "patches": ((2, 3, 32, 48), (40, 8), (slides(16, 16, (16, 16), (0, 0, 0, 0)), ONE)),
    "many outputs": ((2, 40, 9, 9), (400, 8), (slides(3, 3), ONE)),
    "rows longer than a band": ((1, 3, 4, 9000), (8, 8, 3), (slides(3, 3), slides(3, 3), slides(1, 3))),
}


def operands(name: str, bias: bool = True) -> tuple[Any, ...]:
    """x, weights, bias, windows."""
    (n, channels, *lengths), outputs, windows = CHAINS[name]
    made = torch.Generator().manual_seed(0)
    weights = []
    for out, pair in zip(outputs, windows, strict=True):
        taps = [window.size for window in pair if window.size > 1]
        weights.append(torch.randn(out, channels, *taps, generator=made) / channels**0.5)
        channels = out
    some_bias = torch.randn(channels, generator=made) if bias else None
    return (torch.randn(n, CHAINS[name][0][1], *lengths, generator=made), *weights, some_bias, windows)


def mapped(given: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    return tuple(change(t) if isinstance(t, Tensor) else t for t in given)


@pytest.fixture(params=range(3))
def version(request: pytest.FixtureRequest) -> int:
    if request.param >= len(two_products.versions()):
        pytest.skip(f"this processor does not have {two_products.VERSIONS[request.param]}")
    return int(request.param)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_as_good_as_torchs(name: str, bias: bool, version: int) -> None:
    given = operands(name, bias)
    right = reference(*mapped(given, Tensor.double))
    terms = reference(*mapped(given, lambda t: t.double().abs())).norm().item()
    ours, theirs = (
        ((y.double() - right).norm() / terms).item() for y in (run(*given, version=version), reference(*given))
    )
    assert run(*given, version=version).shape == right.shape
    assert ours <= 2 * theirs + 2**-24


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="memory cannot be guarded here")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_nothing_is_read_outside_the_input(stride: int, window: int, version: int) -> None:
    page = mmap.PAGESIZE
    shape, windows = (2, 5, 11, 13), (slides(window, window, (stride, stride)), ONE)
    x, weights = torch.randn(shape), [torch.randn(7, 5, *[window] * 2 * (window > 1)), torch.randn(4, 7)]
    bytes_ = 4 * x.numel()
    pages = -(-bytes_ // page)
    guarded = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(guarded))
    for at in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0) == 0
    for at in (page, (pages + 1) * page - bytes_):  # right behind a page without access, and right before one
        held = torch.frombuffer(guarded, dtype=torch.float32, count=x.numel(), offset=at).view(shape).copy_(x)
        found = run(held, *weights, None, windows, version=version)
        assert torch.allclose(found, reference(x, *weights, None, windows), atol=1e-4)


PIVOTED: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int, Windows]] = {
    "7 x 7": ((5, 32, 7, 7), 16, (16,), 24, (slides(3, 3),)),
    "odd": ((3, 9, 13, 11), 5, (7,), 19, (slides(3, 2, (2, 1)),)),
    "deep, small images": ((7, 300, 3, 3), 33, (70,), 130, (slides(3, 3),)),
    "bands": ((2, 40, 90, 80), 24, (24,), 30, (slides(3, 3),)),
    "no coefficients": ((2, 6, 8, 8), 6, (9,), 9, (slides(3, 3),)),
    "two windows": ((2, 12, 15, 17), 8, (7, 9), 20, (slides(3, 1), slides(1, 3))),
    "many images of one position": ((70, 64, 1, 1), 16, (24,), 64, (slides(1, 1),)),
}
"""Shape of x, channels behind the gather, of the windows' outputs and of the result, windows."""


def pivoted(name: str, form: str, bias: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands and keywords. ``form``: of ``order``, ``stacked`` and ``place`` those that there are."""
    shape, rank, inner, outputs, windows = PIVOTED[name]
    made = torch.Generator().manual_seed(0)
    channels, weights, slid, named = shape[1], [], list(windows), {}
    if "order" in form:
        named["order"] = torch.randperm(channels, generator=made).int()
        weights.append(torch.randn(rank, channels - rank, generator=made) / channels**0.5)
        channels, slid = rank, [ONE, *slid]
    for out, pair in zip(inner, windows, strict=True):
        taps = [window.size for window in pair if window.size > 1]
        weights.append(torch.randn(out, channels, *taps, generator=made) / channels**0.5)
        channels = out
    if "stacked" in form:
        weights.append(torch.randn(outputs - channels, channels, generator=made))
        channels, slid = outputs, [*slid, ONE]
        named["place"] = torch.randperm(outputs, generator=made).int() if "place" in form else None
    some_bias = torch.randn(channels, generator=made) if bias else None
    return (torch.randn(shape, generator=made), *weights, some_bias, tuple(slid)), {
        **named,
        "stacked": "stacked" in form,
    }


@pytest.mark.parametrize("name", PIVOTED)
@pytest.mark.parametrize("form", ["order", "stacked", "stacked place", "order stacked", "order stacked place"])
def test_pivoted_results_are_as_good_as_torchs(name: str, form: str, version: int) -> None:
    for bias in (True, False):
        given, named = pivoted(name, form, bias)
        right = reference(*mapped(given, Tensor.double), **named)
        terms = reference(*mapped(given, lambda t: t.double().abs()), **named).norm().item()
        found = (run(*given, **named, version=version), reference(*given, **named))
        ours, theirs = (((y.double() - right).norm() / terms).item() for y in found)
        assert found[0].shape == right.shape
        assert ours <= 2 * theirs + 2**-24


@pytest.mark.parametrize("name", ["7 x 7", "deep, small images", "bands"])
@pytest.mark.usefixtures("three")
def test_threads_change_no_bit_of_pivoted_results(name: str) -> None:
    given, named = pivoted(name, "order stacked place")
    torch.set_num_threads(1)
    one = run(*given, **named)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(run(*given, **named), one)


def test_indices_that_are_none_are_errors() -> None:
    given, named = pivoted("odd", "order stacked place")
    for key, wrong in (("order", -1), ("order", 9), ("place", 19), ("place", -2)):
        index = named[key].clone()
        index[3] = wrong
        with pytest.raises(IndexError, match="out of range"):
            run(*given, **{**named, key: index})
    twice = named["place"].clone()
    twice[0] = twice[1]
    with pytest.raises(IndexError, match="permutation"):
        run(*given, **{**named, "place": twice})
    for key, index in (("order", named["order"].long()), ("order", named["order"][:-1]), ("place", named["place"][1:])):
        with pytest.raises(ValueError, match="an index"):
            run(*given, **{**named, key: index})
    with pytest.raises(ValueError, match="only where stacked"):
        run(*pivoted("odd", "order")[0], order=named["order"], place=named["place"])


def test_windows_cannot_be_gathered_or_stacked() -> None:
    (x, weight, bias, windows), named = pivoted("odd", "")
    assert named == {"stacked": False}
    order = torch.arange(x.shape[1], dtype=torch.int32)
    for how in ({"order": order}, {"stacked": True}):
        with pytest.raises(ValueError, match="one tap"):
            run(x, weight, bias, windows, **how)  # type: ignore[arg-type]


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["7 x 7", "bands", "bands with a stride", "deep, small images", "windows all"])
@pytest.mark.usefixtures("three")
def test_threads_change_no_bit(name: str) -> None:
    given = operands(name)
    torch.set_num_threads(1)
    one = run(*given)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(run(*given), one)


def test_operands_that_are_not_contiguous_are_read_right() -> None:
    x, *others = operands("channels, window, channels")
    right = run(x, *others)
    assert torch.equal(run(x.contiguous(memory_format=torch.channels_last), *others), right)
    turned = [t.mT.contiguous().mT if isinstance(t, Tensor) and t.ndim > 1 else t for t in others]
    assert torch.equal(run(x, *turned), right)


def test_no_examples_give_none() -> None:
    x, *others = operands("window, channels")
    assert run(x[:0], *others).shape == (0, 5, 12, 10)


def test_what_is_not_finite_stays_where_it_is() -> None:
    x, *others = operands("channels, window, channels")
    x[1, 3, 0, 0] = float("nan")
    found = run(x, *others)
    assert found[0].isfinite().all()
    assert not found[1, :, :2, :2].isfinite().any()
    assert found[1, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, a, b, c, bias, w: (x[0], a, b, c, bias, w), "shapes do not fit"),
        (lambda x, a, b, c, bias, w: (x, a, b, bias, w), "shapes do not fit"),
        (lambda x, a, b, c, bias, w: (x[:, :3], a, b, c, bias, w), "does not fit 3 channels"),
        (lambda x, a, b, c, bias, w: (x, a, b[..., :2], c, bias, w), "does not fit 8 channels and the windows"),
        (lambda x, a, b, c, bias, w: (x, a, b, c, bias[1:], w), "bias"),
        (lambda x, a, b, c, bias, w: (x.double(), a, b, c, bias, w), "float32"),
        (lambda x, a, b, c, bias, w: (x, a, b, c, bias, (w[0], slides(3, 3, pad=(0, 0, 0, 0)), w[2])), None),
        (lambda x, a, b, c, bias, w: (x[..., :2], a, b, c, bias, (w[0], slides(3, 3, pad=(0,) * 4), w[2])), "smaller"),
        (
            lambda x, a, b, c, bias, w: (
                x,
                a,
                b,
                c,
                bias,
                (w[0], tuple(replace(one, dilation=2) for one in w[1]), w[2]),
            ),
            "dilation",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_anything_is_read(change: Any, reason: str | None) -> None:
    given = change(*operands("channels, window, channels"))
    if reason is None:
        torch.testing.assert_close(run(*given), reference(*given), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ValueError, match=reason):
        run(*given)


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 9"):
        run(*operands("7 x 7"), version=9)


def test_groups_and_dilation_are_declined() -> None:
    assert isinstance(kernels.match(CONV), kernels.Match)
    groups = replace(CONV, sizes=(("g", 2), *CONV.sizes[1:]))
    wide = replace(CONV.ops[0], windows=dilated(CONV.ops[0].windows))
    for block in (groups, replace(CONV, ops=(wide, CONV.ops[1]))):
        found = kernels.match(block)
        assert isinstance(found, Decline)
        assert "takes float32, on the processor, contiguous, one group, no dilation" in found.reason


OPERANDS = [("7 x 7", "order stacked place"), ("odd", "order"), ("two windows", "stacked"), ("bands", "")]


def by_operator(name: str, form: str, bias: bool = True) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operator; operands and keywords of the reference."""
    given, named = pivoted(name, form, bias)
    x, *weights, some_bias, windows = given
    numbers = convolutions._encoded(windows)
    return (x, weights, some_bias, numbers, named.get("order"), named.get("place"), named["stacked"]), given, named


@pytest.mark.parametrize(("name", "form"), OPERANDS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_obeys_the_rules_of_torch(name: str, form: str, grad: bool) -> None:
    given, _, _ = by_operator(name, form)
    for operand in (given[0], *given[1], given[2]):
        operand.requires_grad_(grad)
    result = torch.library.opcheck(convolutions.operator(), given)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "form"), OPERANDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_stock_operators(name: str, form: str, bias: bool) -> None:
    given, plain, named = by_operator(name, form, bias)
    floats = [t for t in (given[0], *given[1], given[2]) if t is not None]
    for operand in floats:
        operand.requires_grad_()
    ours, theirs = convolutions.operator()(*given), reference(*plain, **named)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, floats, direction), torch.autograd.grad(theirs, floats, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_what_the_c_code_does_not_take_the_operator_runs_by_stock_operators() -> None:
    given, plain, named = by_operator("7 x 7", "order stacked place")
    doubled = [[t.double() for t in g] if isinstance(g, list) and isinstance(g[0], Tensor) else g for g in given]
    doubled = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in doubled]
    right = reference(*mapped(plain, lambda t: t.double() if t.is_floating_point() else t), **named)
    assert torch.equal(convolutions.operator()(*doubled), right)
    last = [given[0].contiguous(memory_format=torch.channels_last), *given[1:]]
    torch.testing.assert_close(convolutions.operator()(*last), reference(*plain, **named), rtol=1e-4, atol=1e-4)
