"""Exactness through a folded gather: at full rank the model must compute what it computed before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.frontends.nn import NnProgram
from tdc.ir import Candidate, Plan
from tdc.testing import assert_close, random_weight

Function = Callable[[Tensor], Tensor]
ELEMENTWISE: dict[str, Function] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "nothing": lambda x: x,
    "square": lambda x: x * x,
    "scalar": lambda x: 2 * x + 1,
    "self-gate": lambda x: x * torch.sigmoid(x),
}
RAMP = torch.linspace(1, 2, 20, dtype=torch.float64)
ORDERED: dict[str, Function] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "layer-norm": lambda x: nn.functional.layer_norm(x, (20,), RAMP),
    "ramp": lambda x: x * RAMP,
    "shift": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "cumulate": lambda x: x.cumsum(-1),
    "heads": lambda x: x.reshape(-1, 4, 5).transpose(1, 2).reshape(-1, 20),
    "glu": lambda x: torch.cat([x[..., :10] * x[..., 10:], x[..., 10:]], -1),
    "mask": lambda x: torch.where(torch.arange(20) < 7, x, -x),
}


class Pair(nn.Module):
    def __init__(self, between: Function) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(12, 20), nn.Linear(20, 10), between
        with torch.no_grad():
            self.first.weight.copy_(random_weight(20, 12))
            self.second.weight.copy_(random_weight(10, 20))
            self.first.bias.copy_(torch.linspace(-1, 1, 20))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Residual(Pair):
    """The hidden values are read a second time."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.relu(hidden)) + hidden[..., :10]


class Exposed(Pair):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.first(x)
        return self.second(torch.relu(hidden)), hidden


class TiedReader(Pair):
    """The second weight has another use, whose input is in the true order."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.third = nn.Linear(20, 10).double()
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.third(torch.cat([x, x[..., :8]], -1))


X = random_weight(6, 12, seed=8)


def full_rank(model: nn.Module, first: str = "output", second: str = "output", name: str = "pivoted") -> nn.Module:
    sites, _ = NnProgram(model, X).sites()
    d = decompositions.get(name)
    choices = [
        Candidate(site, name, variant, tuple(d.full_ranks(site.axes, variant).items()))
        for site, variant in zip(sites, (first, second), strict=True)
    ]
    return tdc.compress(model, X, plan=Plan(tuple(choices)), progress=False)


def folded(small: nn.Module) -> bool:
    """True if the first layer has no gather of its output any more."""
    return all(op.kind != "take" for op in small.first.block.ops)


@pytest.mark.parametrize("second", ["output", "input"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_gather_is_folded_through_elementwise_functions_and_nothing_changes(name: str, second: str) -> None:
    model = Pair(ELEMENTWISE[name])
    small = full_rank(model, second=second)
    assert_close(small(X), model(X), 1e-12)
    assert_close(tdc.densify(small)(X), model(X), 1e-12)


def test_a_gather_before_a_relu_is_folded() -> None:
    assert folded(full_rank(Pair(torch.relu)))


@pytest.mark.parametrize("name", ORDERED)
def test_functions_that_know_the_order_of_their_input_get_the_true_order(name: str) -> None:
    model = Pair(ORDERED[name])
    assert_close(full_rank(model)(X), model(X), 1e-12)


@pytest.mark.parametrize("kind", [Residual, Exposed])
def test_hidden_values_that_others_read_keep_their_order(kind: type[Pair]) -> None:
    model = kind(torch.relu)
    small = full_rank(model)
    assert not folded(small)
    torch.testing.assert_close(small(X), model(X), rtol=1e-12, atol=1e-12)


def test_a_reader_with_another_use_is_not_reordered() -> None:
    model = TiedReader()
    assert_close(full_rank(model)(X), model(X), 1e-12)


def test_hidden_values_that_a_hook_reads_keep_their_order() -> None:
    seen: list[Tensor] = []
    model = Pair(torch.relu)
    model.first.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(X)
    expected = seen[-1]
    full_rank(model)(X)
    assert_close(seen[-1], expected, 1e-12)


def test_a_frozen_bias_and_no_bias_are_fine() -> None:
    model = Pair(torch.relu)
    model.first.bias.requires_grad_(False)
    assert_close(full_rank(model)(X), model(X), 1e-12)
    model.first.bias = None
    assert_close(full_rank(model)(X), model(X), 1e-12)


def test_the_original_keeps_its_bias() -> None:
    model = Pair(torch.relu)
    before = model.first.bias.clone()
    full_rank(model)
    assert torch.equal(model.first.bias, before)
    assert torch.equal(before, torch.linspace(-1, 1, 20).double())
