"""Residual connections: what the outputs of sites are added to, and fits that make up for its error too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tdc
from tdc.frontends.fx.export import open_exported
from tdc.frontends.nn import NnProgram
from tdc.frontends.program import Change
from tdc.ir import Metric, Site
from tdc.passes._pair import Pair


class Branch(nn.Module):
    """``join(x, second(tanh(first(x))))`` behind one more layer."""

    def __init__(self, join: Callable[[Any, Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.before, self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm, self.join = nn.LayerNorm(width), join

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).sin()
        return self.join(self, x, self.second(torch.tanh(self.first(x))))


def in_place(self: Any, x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


def late(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + x.cos()


JOINS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "sum": (lambda self, x, y: x + y, True),
    "other way round": (lambda self, x, y: torch.add(y, x), True),
    "in place": (in_place, True),
    "behind dropout": (lambda self, x, y: self.norm(x + functional.dropout(y, 0.1, self.training)), True),
    "behind a view": (lambda self, x, y: x + y.view(2, 2, 6).flatten(0, 1), True),
    "made later": (late, False),
    "scaled": (lambda self, x, y: x + 0.5 * y, False),
    "scaled in the sum": (lambda self, x, y: torch.add(x, y, alpha=2), False),
    "used twice": (lambda self, x, y: (x + y) * y, False),
    "added twice": (lambda self, x, y: (x + y) + y, False),
    "to itself": (lambda self, x, y: y + y, False),
    "a number": (lambda self, x, y: y + 1, False),
    "nothing": (lambda self, x, y: y, False),
}


def program_of(door: str, model: nn.Module, x: Tensor) -> Any:
    return NnProgram(model, (x,)) if door == "nn" else open_exported(torch.export.export(model, (x,)))


def met(program: Any, data: list[tuple[Tensor, ...]], change: Change | None = None) -> dict[int, Any]:
    """What each site's outputs are added to, in the order of the runs."""
    sites = program.sites()[0]
    found: dict[int, Any] = {}

    def visit(site: Site, activations: Any, beside: Any) -> Change | None:
        found[site.order] = [None if b is None else b.clone() for b in beside]
        return change if site.order == 0 else None

    with torch.no_grad():
        assert program.lockstep(list(program.batches(data)), sites, visit) == ""
    return found


@pytest.mark.parametrize("door", ["nn", "export"])
@pytest.mark.parametrize("case", JOINS)
def test_what_an_output_is_added_to_is_handed_over_where_that_is_all(case: str, door: str) -> None:
    join, wanted = JOINS[case]
    model, data = Branch(join).eval(), [torch.randn(4, 6), torch.randn(4, 6)]
    new = torch.randn(6, 6)
    found = met(program_of(door, model, data[0]), [(x,) for x in data], Change(new, None))
    assert found[0] == found[1] == [None] * 4
    if not wanted:
        assert found[2] == [None] * 4
        return
    with torch.no_grad():
        dense = [model.before(x).sin() for x in data]
        changed = [(x @ new.T).sin() for x in data]
    for given, x in zip(found[2], [*dense, *changed], strict=True):
        assert torch.allclose(given.reshape(x.shape), x, atol=1e-6)


@pytest.mark.parametrize("door", ["nn", "export"])
def test_a_folded_normalisation_belongs_to_the_output(door: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norms[0](self.first(x)))
            return torch.relu(self.norms[1](self.second(x)) + x)

    model, x = Block().eval(), torch.randn(2, 4, 5, 5)
    found = met(program_of(door, model, x), [(x,)])
    with torch.no_grad():
        before = torch.relu(model.norms[0](model.first(x)))
    assert found[0] == [None, None]
    assert all(torch.allclose(given, before, atol=1e-5) for given in found[1])


def test_the_target_is_the_least_squares_solution_for_the_sum() -> None:
    """``min ||(W X + S) - (B Z + T)||``, up to the ridge of 1 % and the shrinkage; the mean goes into a bias."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(8, 6)
    x = torch.randn(4000, 8, generator=generator)
    z = x + 0.3 * torch.tanh(x @ torch.randn(8, 8, generator=generator))
    s = torch.randn(4000, 6, generator=generator)
    t = s + 0.2 * (x @ torch.randn(8, 6, generator=generator)) + 0.5
    (place,) = NnProgram(nn.Sequential(layer), (x,)).sites()[0]
    weight = layer.weight.detach().double()
    pair = Pair.of(place, [x, z], beside=[s, t])
    assert pair.added is not None
    target, _ = pair.target(weight, Metric("input", torch.eye(8, dtype=torch.float64), torch.zeros(8)))
    x, z, s, t = (v.double() for v in (x, z, s, t))
    wanted = x @ weight.T + s - t
    rows = torch.cat([z, torch.ones(4000, 1)], 1).double()
    rest = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
    shift = x.mean(0) @ weight.T - z.mean(0) @ target.T + pair.added[1][0]
    lost = float((wanted - z @ target.T - shift).square().sum())
    assert float(rest.square().sum()) * (1 - 1e-9) <= lost <= 1.005 * float(rest.square().sum())


def test_rows_that_are_not_those_of_the_outputs_are_left_alone() -> None:
    x, z = torch.randn(12, 4), torch.randn(12, 4)
    (place,) = NnProgram(nn.Sequential(nn.Linear(4, 3)), (x,)).sites()[0]
    wrong: list[list[Tensor | None]] = [
        [torch.randn(1, 3), torch.randn(1, 3)],
        [None, None],
        [torch.randn(12, 3), None],
    ]
    for sums in [*wrong, [torch.randn(12, 3), torch.randn(6, 3)], []]:
        assert Pair.of(place, [x, z], beside=sums).added is None
    (place,) = NnProgram(nn.Sequential(nn.Conv2d(2, 3, 3)), (torch.randn(2, 2, 5, 5),)).sites()[0]
    x, z = (torch.randn(2, 2, 5, 5) for _ in range(2))
    for shape, wanted in (((2, 3, 3, 3), True), ((2, 3, 1, 1), False), ((2, 27), False), ((1, 3, 3, 3), False)):
        sums = [torch.randn(shape), torch.randn(shape)]
        assert (Pair.of(place, [x, z], beside=sums).added is not None) == wanted


def test_what_moves_by_more_than_rounding_counts() -> None:
    x, s = torch.randn(12, 4), torch.randn(12, 3)
    (place,) = NnProgram(nn.Sequential(nn.Linear(4, 3)), (x,)).sites()[0]
    assert not Pair.of(place, [x, x.clone()], beside=[s, s * (1 + 1e-7)]).moved
    assert Pair.of(place, [x, x.clone()], beside=[s, s * 1.01]).moved


@pytest.mark.parametrize("door", ["nn", "export"])
def test_a_deep_residual_model_changes_less_than_without(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Branch(lambda self, x, y: x + self.norm(x + y), 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, data = Deep().eval(), torch.randn(3000, 32)
    given: Any = (
        model if door == "nn" else torch.export.export(model, (data[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    )
    run = tdc.compress if door == "nn" else tdc.compress_export
    batches = [(part,) for part in data[:2000].split(250)]

    def lost() -> float:
        example = [(data[:2],)] if door == "nn" else []
        small: Any = run(given, *example, budget="params=0.6", calibration=batches, progress=False)
        small = small if door == "nn" else small.module()
        with torch.no_grad():
            wanted = model(data[2000:])
            return float((small(data[2000:]) - wanted).square().sum() / wanted.square().sum())

    with_sums = lost()
    of = Pair.of
    monkeypatch.setattr(Pair, "of", lambda site, activations, importance, *_: of(site, activations, importance))
    assert with_sums < 0.95 * lost()


def test_layers_of_other_heights_that_read_the_same_input_are_fitted_too() -> None:
    """Grouped-query attention: what they read is worked out once for all."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.query, self.value, self.out = (
                nn.Linear(24, width, bias=False) for width in (24, 24, 12, 24)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x).sin()
            return x + self.out(self.query(x) * self.value(x).repeat(1, 2).sigmoid())

    model, data = Grouped().eval(), torch.randn(400, 24)
    options: dict[str, Any] = {"budget": "params=0.7", "allow": "svd", "allocation": "uniform", "progress": False}
    small = tdc.compress(model, calibration=list(data.split(100)), **options)
    assert tdc.report(small).replaced == 4


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_target_goes_as_far_from_the_weight_as_other_batches_bear_out(noise: float) -> None:
    """All the way where the halves of the batches agree; hardly where what is added is noise."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(32, 6, bias=False)
    x = [torch.randn(100, 32, generator=generator) for _ in range(2)]
    mix = 0.2 * torch.randn(32, 6, generator=generator)
    s = [batch @ mix + noise * torch.randn(100, 6, generator=generator) for batch in x]
    t = [torch.zeros(100, 6) for _ in x]
    (place,) = NnProgram(nn.Sequential(layer), (x[0],)).sites()[0]
    weight = layer.weight.detach().double()
    pair = Pair.of(place, [*x, *x], beside=[*s, *t])
    target, _ = pair.target(weight, Metric("input", torch.eye(32, dtype=torch.float64)))
    wanted, found = mix.T.double(), target - weight
    whole = torch.linalg.lstsq(torch.cat(x), torch.cat(s)).solution.T.double()
    if noise == 0:
        assert torch.allclose(found, wanted, atol=0.05 * float(wanted.abs().max()))
    else:
        assert float((found - wanted).norm()) < 0.7 * float((whole - wanted).norm())
