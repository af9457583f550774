"""How far a compressed module is from the dense one between its layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.inside import Inputs, Inside
from tdc.testing import random_cnn

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Two layers that read one tensor, and one that reads what these give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.key, self.last = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.query(hidden) * torch.sigmoid(self.key(hidden)))


def both() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Attention().eval()
    small = tdc.compress(dense, budget="params=0.8", allow="svd", calibration=[X], allocation="uniform", progress=False)
    return small, dense


def runs(inside: Inside, small: nn.Module, dense: nn.Module, x: Tensor) -> tuple[Inputs, Inputs]:
    with inside.reading(dense) as wanted:
        dense(x)
    with inside.reading(small) as given:
        small(x)
    return wanted, given


def test_each_tensor_that_is_read_counts_once_and_hooks_are_gone() -> None:
    small, dense = both()
    inside = Inside(small, dense)
    wanted, given = runs(inside, small, dense, X)
    assert [*wanted] == [*given] == ["first", "query", "last"]
    assert torch.equal(wanted["query"], torch.tanh(dense.first(X)))
    assert not any(m._forward_pre_hooks for model in (small, dense) for m in model.modules())


def test_at_the_start_each_layer_counts_alike() -> None:
    small, dense = both()
    inside = Inside(small, dense)
    pairs = [runs(inside, small, dense, x) for x in X.split(32)]
    inside.weigh(pairs, 3.0)
    assert {*inside.weights} == {"query", "last"}  # the first one reads what the dense one reads
    parts = []
    for path, weight in inside.weights.items():
        errors = []
        for wanted, given in pairs:
            size = wanted[path].square().sum(1)
            errors.append(((given[path] - wanted[path]).square().sum(1) / size.clamp(min=float(size.mean()))).mean())
        parts.append(weight * float(sum(errors)) / 2)
    assert parts == pytest.approx([1.5, 1.5], rel=1e-5)
    assert float(sum(inside.distance(*pair).detach() for pair in pairs)) / 2 == pytest.approx(3.0, rel=1e-5)


def test_a_few_rows_of_great_values_do_not_outweigh_the_others() -> None:
    small, dense = both()
    inside = Inside(small, dense)
    wanted, given = runs(inside, small, dense, X)
    inside.weigh([(wanted, given)], 1.0)
    great = {path: torch.cat([value, 100 * value[:1]]) for path, value in wanted.items()}
    moved = {path: torch.cat([value, 100 * value[:1]]) for path, value in given.items()}
    first = {path: value[:1] for path, value in wanted.items()}, {path: value[:1] for path, value in given.items()}
    assert float(inside.distance(great, moved).detach()) < 3 * float(inside.distance(*first).detach()) / 65


def test_units_in_another_order_and_fewer_units_are_left_out() -> None:
    small, dense = both()
    inside = Inside(small, dense)
    wanted, given = runs(inside, small, dense, X)
    turned = {**given, "last": given["last"].roll(1, -1)}
    for odd in (turned, {**given, "last": given["last"][:, :8]}):
        inside.weigh([(wanted, given), (wanted, odd)], 1.0)
        assert {*inside.weights} == {"query"}


def test_a_gather_folded_into_the_next_layer_is_seen() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 12), nn.LayerNorm(12), nn.Linear(12, 12)).eval()
    small = tdc.compress(dense, budget="params=0.7", allow="pivoted", calibration=[X], progress=False)
    plan = tdc.plan(dense, (X,), budget="params=0.7", allow="pivoted", statistics=tdc.calibrate(dense, [X]))
    assert [choice.site.name for choice in plan.choices if choice.folded] == ["0.weight"]
    inside = Inside(small, dense)
    inside.weigh([runs(inside, small, dense, X)], 1.0)
    assert {*inside.weights} == {"4"}


def test_channels_of_images_are_rows() -> None:
    dense, x = random_cnn(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    small = tdc.compress(dense, budget="params=0.5", calibration=[x], progress=False)
    inside = Inside(small, dense)
    wanted, given = runs(inside, small, dense, x)
    assert {value.shape[-1] for value in wanted.values()} <= {3, 16, 24}
    assert wanted.keys() == given.keys()
    inside.weigh([(wanted, given)], 1.0)
    distance = inside.distance(wanted, given)
    distance.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in small.parameters())
