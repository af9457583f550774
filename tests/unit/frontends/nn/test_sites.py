"""Which weights of a module are sites, and what happens to shared, tied and unreachable ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.frontends.nn import FactoredLinear, NnProgram
from tdc.ir import Candidate, Plan
from tdc.testing import assert_close, random_mlp, random_weight

X = torch.zeros(4, 16)


def layer(rows: int, columns: int, seed: int = 0) -> nn.Linear:
    made = nn.Linear(columns, rows)
    with torch.no_grad():
        made.weight.copy_(random_weight(rows, columns, seed=seed))
        made.bias.copy_(torch.linspace(-1, 1, rows))
    return made


class Square(nn.Module):
    """Two 16x16 layers ``first`` and ``second``, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(16, 16), layer(16, 16, 1), layer(12, 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def shared() -> Square:
    model = Square()
    model.second = model.first
    return model


def tied() -> Square:
    model = Square()
    model.second.weight = model.first.weight
    return model


def compressed(model: nn.Module, x: Any = X, **options: Any) -> Any:
    return tdc.compress(model, x, **{"budget": "params=0.6", "allocation": "uniform", "progress": False, **options})


def remarks_on(small: nn.Module, site: str) -> str:
    return "; ".join(r.reason for r in tdc.report(small).remarks if r.site == site)


def test_sites_come_in_the_order_of_use() -> None:
    class Backwards(Square):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(self.second(x)))

    sites, remarks = NnProgram(Backwards(), X).sites()
    assert [site.name for site in sites] == ["second.weight", "first.weight", "head.weight"]
    assert [site.order for site in sites] == [0, 1, 2]
    assert not remarks


def test_one_module_at_two_places_becomes_one_factored_module() -> None:
    small = compressed(shared())
    assert isinstance(small.first, FactoredLinear)
    assert small.first is small.second
    site = tdc.report(small).sites[0]
    assert site.before.params == 256
    assert site.before.macs == 2 * 256
    assert tdc.report(small).before.params == 256 + 192


def test_tied_weights_share_their_factors_and_are_counted_once() -> None:
    small = compressed(tied())
    assert small.first is not small.second
    for name in small.first.factors:
        assert getattr(small.first, f"weight_{name}") is getattr(small.second, f"weight_{name}")
    assert small.first.bias is not small.second.bias
    report = tdc.report(small)
    assert report.before.params == 256 + 192
    assert report.model_after.params == sum(p.numel() for p in small.parameters())
    assert report.model_before.params == 256 + 192 + 16 + 16 + 12


@pytest.mark.parametrize("make", [shared, tied])
def test_shared_and_tied_models_are_saved_and_loaded(tmp_path: Any, make: Any) -> None:
    small, x = compressed(make()), torch.randn(4, 16)
    tdc.save(small, tmp_path / "m.tdc")
    again = tdc.load(tmp_path / "m.tdc", make())
    assert torch.equal(again(x), small(x))
    assert len(list(again.parameters())) == len(list(small.parameters()))


@pytest.mark.parametrize("make", [shared, tied, Square])
def test_densify_undoes_shared_and_tied_sites(make: Any) -> None:
    small, x = compressed(make().double(), X.double()), random_weight(5, 16)
    dense = tdc.densify(small)
    assert_close(dense(x), small(x), 1e-12)
    assert (dense.first is dense.second) is (small.first is small.second)


def test_tied_weights_stay_tied_when_densified() -> None:
    dense = tdc.densify(compressed(tied()))
    assert dense.first.weight is dense.second.weight


def test_layers_that_share_a_bias_compute_the_same_function() -> None:
    """Whatever is done to the order of one layer's outputs must not move the other's bias."""
    model, x = Square().double(), random_weight(5, 16)
    model.second.bias = model.first.bias
    d = decompositions.get("pivoted")
    sites, _ = NnProgram(model, x).sites()
    choices = [Candidate(s, "pivoted", "output", tuple(d.full_ranks(s.axes, "output").items())) for s in sites]
    small = tdc.compress(model, x, plan=Plan(tuple(choices)), progress=False)
    assert tdc.report(small).replaced == 3
    assert_close(small(x), model(x), 1e-12)
    assert_close(tdc.densify(small)(x), model(x), 1e-12)


def test_a_linear_tied_to_an_embedding_stays_dense_with_a_remark() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(32, 16), layer(16, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.embed(ids)))

    small = compressed(Language(), torch.zeros(2, 3, dtype=torch.long))
    assert small.head.weight is small.embed.weight
    assert "tied to" in remarks_on(small, "embed.weight")
    assert isinstance(small.body, FactoredLinear)


def test_attention_that_cannot_be_opened_stays_dense_with_a_remark() -> None:
    """nn.MultiheadAttention reads out_proj.weight itself, past the module; with keys of zeros it stays as it is."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True)
            self.body = layer(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.attention(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 4, 16)
    small = compressed(Attention(), x)
    assert small(x).shape == x.shape
    assert remarks_on(small, "attention.out_proj.weight")
    assert remarks_on(small, "attention.in_proj_weight")
    assert not isinstance(small.attention.out_proj, FactoredLinear)
    assert isinstance(small.body, FactoredLinear)


def test_a_weight_that_is_also_read_otherwise_stays_dense() -> None:
    class Penalised(Square):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.first.weight.square().sum()

    small = compressed(Penalised())
    assert "in a way that no layer does" in remarks_on(small, "first.weight")
    assert type(small.first) is nn.Linear
    assert isinstance(small.second, FactoredLinear)


def test_a_weight_that_is_read_past_its_module_stays_dense() -> None:
    class Functional(Square):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(self.second(x), self.first.weight))

    small = compressed(Functional())
    assert "past its own module" in remarks_on(small, "first.weight")
    assert type(small.first) is nn.Linear


def test_a_layer_that_is_never_called_stays_dense() -> None:
    class Idle(Square):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x))

    small = compressed(Idle())
    assert "do not reach it" in remarks_on(small, "second.weight")
    assert type(small.second) is nn.Linear


def test_a_parametrized_layer_stays_dense() -> None:
    model = Square()
    nn.utils.parametrizations.weight_norm(model.first)
    small, x = compressed(model), torch.randn(4, 16)
    assert not isinstance(small.first, FactoredLinear)
    assert isinstance(small.second, FactoredLinear)
    assert small(x).shape == (4, 12)


def test_a_layer_with_its_own_forward_stays_dense() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Square()
    model.first = Scaled(16, 16)
    small = compressed(model)
    assert type(small.first) is Scaled
    assert remarks_on(small, "first.weight")


class Branching(Square):
    """Control flow on data: torch.export cannot capture it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def test_a_model_that_cannot_be_captured_falls_back_to_the_module_tree() -> None:
    plain, branching = compressed(Square()), compressed(Branching())
    choices = [
        [(s.name, s.decomposition, s.ranks, s.after.params) for s in tdc.report(small).sites]
        for small in (plain, branching)
    ]
    assert choices[0] == choices[1]
    assert "torch.export cannot capture the model" in remarks_on(branching, "")
    assert "torch.export" not in remarks_on(plain, "")
    x = torch.randn(4, 16)
    assert_close(branching(x), plain(x), 1e-5)


def test_the_module_tree_counts_calls_and_finds_idle_layers() -> None:
    class Twice(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(self.first(x))) if float(x.sum()) > -1e9 else x

    small = compressed(Twice())
    assert tdc.report(small).sites[0].before.macs == 2 * 256
    assert "not called" in remarks_on(small, "second.weight")


def test_thin_layers_are_left_out_with_a_remark() -> None:
    model = nn.Sequential(layer(16, 16), nn.ReLU(), nn.Linear(16, 1))
    small = compressed(model)
    assert "rank 1 by its shape" in remarks_on(small, "2.weight")
    assert type(small[2]) is nn.Linear


def test_frozen_weights_give_frozen_factors() -> None:
    model = random_mlp()
    model[0].weight.requires_grad_(False)
    small = compressed(model, torch.zeros(2, 24))
    assert not any(f.requires_grad for f in small[0].factors.values())
    assert all(f.requires_grad for f in small[2].factors.values() if f.is_floating_point())
