from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import kernels

pytestmark = pytest.mark.usefixtures("compiled")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def _other_memory(layer: nn.Module) -> None:
    for factor in layer.parameters():
        factor.data = factor.data * 2


def _other_factors(layer: nn.Module) -> None:
    for name, factor in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(factor.detach() + 1))


def _same_memory(layer: nn.Module) -> None:
    for factor in layer.parameters():
        factor.data.mul_(3)


def _turned(layer: nn.Module) -> None:
    for factor in layer.parameters():
        if factor.ndim == 2 and factor.shape[0] == factor.shape[1]:
            factor.data = factor.data.T


def _without_bias(layer: nn.Module) -> None:
    layer.bias = None


CHANGES = (_other_memory, _other_factors, _same_memory, _turned, _without_bias, nn.Module.double, lambda layer: None)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dense", [False, True])
def test_a_layer_that_ran_on_its_kernel_sees_what_changes(
    gains: dict[int, float], calls: list[int], change: Callable[[nn.Module], object], dense: bool
) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(24, 24))
    if not dense:
        plan = tdc.plan(model, X, budget="params=0.9", metric="weight", allow="svd", progress=False)
        model = tdc.compress(model, X, plan=plan, progress=False)
    plain = copy.deepcopy(model.eval())
    kernels.accelerate(model, rows=(1,))
    with torch.no_grad():
        for _ in range(3):
            assert_same(model(X[:1]), plain(X[:1]))
        assert calls == [1, 1, 1]
        assert model[0].__dict__["_quick"] is not None
        for other in (model, plain):
            change(other[0])
        x = X[:1].to(next(plain.parameters()).dtype)
        for _ in range(2):
            assert_same(model(x), plain(x))
        assert_same(model(X[None, :1].expand(2, 1, 24).to(x.dtype)), plain(X[None, :1].expand(2, 1, 24).to(x.dtype)))
        assert_same(copy.deepcopy(model)(x), plain(x))
