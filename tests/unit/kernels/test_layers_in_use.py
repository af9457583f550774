"""Layers on kernels beside everything else that torch does with layers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import tdc
from tdc import kernels
from tdc.errors import OptionError
from tdc.kernels import layers, measure
from tdc.kernels.dense import KernelLinear

pytestmark = pytest.mark.usefixtures("compiled")

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels are found to be faster."""
    monkeypatch.setattr(layers, "measured", lambda *what, **how: 2.0)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).eval().requires_grad_(False)


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """As it is, and on kernels."""
    plain = mlp()
    fast = copy.deepcopy(plain)
    kernels.accelerate(fast, rows=(1, 8))
    assert sum(type(layer) is KernelLinear for layer in fast) == 2
    return plain, fast


def test_gradients_that_go_forwards_go_through() -> None:
    plain, fast = pair()
    for model in (plain, fast):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
        assert tangent is not None
    jacobians = [
        torch.autograd.functional.jacobian(model, X[:1], strategy="forward-mode", vectorize=True)
        for model in (plain, fast)
    ]
    torch.testing.assert_close(jacobians[1], jacobians[0])


@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_traces_see_stock_operators(pre_dispatch: bool) -> None:
    plain, fast = pair()
    traced = make_fx(fast, pre_dispatch=pre_dispatch)(X)
    torch.testing.assert_close(traced(2 * X), plain(2 * X))


def test_modes_of_functions_see_the_product() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return 2 * result if function is nn.functional.linear else result

    plain, fast = pair()
    with Doubling():
        torch.testing.assert_close(fast(X), plain(X))


@pytest.mark.parametrize("work", [tdc.compress, tdc.plan])
def test_an_accelerated_model_can_be_compressed(work: Callable[..., Any]) -> None:
    plain, fast = pair()
    options = {"budget": "params=0.6", "metric": "weight", "progress": False}
    made = [work(model, X, **options) for model in (plain, fast)]
    if work is tdc.plan:
        assert [c.ranks for c in made[0].choices] == [c.ranks for c in made[1].choices]
    else:
        torch.testing.assert_close(made[1](X), made[0](X))
        assert not any(type(layer) is KernelLinear for layer in made[1])
    assert tdc.calibrate(fast, [X], progress=False).sites
    inside = tdc.compress(fast, X, inplace=True, exclude="2", **options)
    torch.testing.assert_close(inside(X), tdc.compress(plain, X, exclude="2", **options)(X))


@pytest.mark.parametrize("rows", [(), (1, 8)])
def test_a_layer_that_is_parametrized_afterwards(rows: tuple[int, ...]) -> None:
    plain, fast = pair()
    for model in (plain, fast):
        parametrizations.weight_norm(model[0])
    kernels.accelerate(fast, rows)
    torch.testing.assert_close(fast(X), plain(X))
    for model in (plain, fast):
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    kernels.accelerate(fast, rows)
    torch.testing.assert_close(fast(X), plain(X))


def test_a_parametrization_is_worked_out_once_a_call() -> None:
    plain, fast = pair()
    for model in (plain, fast):
        torch.manual_seed(3)
        parametrizations.spectral_norm(model[0])
        model.train()
        model(X), model(X)
    torch.testing.assert_close(fast(X), plain(X))
    torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))


def test_other_layouts_run_as_they_do_in_torch() -> None:
    plain, fast = pair()
    sparse = X.relu().to_sparse()
    torch.testing.assert_close(fast[0](sparse), plain[0](sparse))
    for model in (plain, fast):
        model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(fast(X), plain(X))
    kernels.accelerate(fast, rows=(1, 8))
    torch.testing.assert_close(fast(X), plain(X))
    nested = torch.nested.nested_tensor([X[:3], X[:5]])
    other = pair()
    for one, two in zip(other[1](nested).unbind(), other[0](nested).unbind(), strict=True):
        torch.testing.assert_close(one, two)


def test_numbers_with_their_signs_turned() -> None:
    plain, fast = pair()
    bias = torch.complex(torch.zeros(32), torch.arange(32.0)).conj().imag
    assert bias.is_neg()
    for model in (plain, fast):
        model[0].bias = nn.Parameter(bias, requires_grad=False)
    torch.testing.assert_close(fast(X), plain(X))


def test_errors_are_those_of_torch() -> None:
    _, fast = pair()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(X[:, :5])
    with pytest.raises(RuntimeError, match="dtype"):
        fast(X.double())
    with pytest.raises(OptionError, match="above 0"):
        kernels.accelerate(fast, rows=(-3,))


def test_files_of_weights_only_hold_layers_of_torch() -> None:
    plain, fast = pair()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        loaded = torch.load(file, weights_only=True)
    assert [type(layer) for layer in loaded] == [type(layer) for layer in plain]
    torch.testing.assert_close(loaded(X), plain(X))


def test_an_example_leaves_random_numbers_as_they_were() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x + torch.randn_like(x))
            return result

    model, state = Noisy(), torch.get_rng_state()
    kernels.accelerate(model, example=X)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_measurement_is_without_autocast_and_what_gives_nothing_gains_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    model = mlp()
    found = kernels.match(KernelLinear.own.fget(model[0]))  # type: ignore[attr-defined]
    assert isinstance(found, kernels.Match)
    seen: list[bool] = []

    def run(x: Tensor, factors: Any, bias: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return found.run(x, factors, bias)

    with torch.autocast("cpu", torch.bfloat16):
        measure.timed(found, {"weight": model[0].weight}, model[0].bias, (8, 24), run=run)
    assert seen
    assert not any(seen)
    none = measure.timed(found, {"weight": model[0].weight}, model[0].bias, (8, 24), run=lambda *what: None)
    assert none.gain == 0


def test_weights_are_as_cold_as_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(layers, "measured", lambda *what, cold: seen.append(cold) or 1.0)
    model = mlp()
    kernels.accelerate(model, rows=(1,))
    assert set(seen) == {4 * sum(p.numel() for p in model.parameters())}
