"""Fits on the inputs that the sites before, already cut, give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.decompositions import low_rank
from tdc.frontends.lockstep import Meet, in_step
from tdc.frontends.nn import NnProgram
from tdc.frontends.program import Change
from tdc.ir import Metric, Site
from tdc.passes._pair import Pair
from tdc.testing import random_cnn, random_mlp, random_site, random_weight


def deep(generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        layer = nn.Linear(32, 32)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(32, 32, generator=generator) / 3)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def changed(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        dense = model(x)
        return float((small(x) - dense).square().sum() / dense.square().sum())


def test_the_output_of_a_deep_model_changes_less_on_other_data() -> None:
    generator = torch.Generator().manual_seed(1)
    model, data = deep(generator), torch.randn(3000, 32, generator=generator)
    batches = list(data[:2000].split(250))
    known = tdc.calibrate(model, batches, progress=False)
    options: dict[str, Any] = {"budget": "params=0.6", "statistics": known, "allow": "pivoted", "progress": False}
    plain = tdc.compress(model, (data[:2],), **options)
    anchored = tdc.compress(model, (data[:2],), calibration=batches, **options)
    assert tdc.report(plain).sites[3].ranks == tdc.report(anchored).sites[3].ranks
    assert changed(model, anchored, data[2000:]) < 0.9 * changed(model, plain, data[2000:])


def test_a_convolutional_model_with_folded_normalisations_changes_less_too() -> None:
    generator = torch.Generator().manual_seed(2)
    model, data = random_cnn(), torch.randn(192, 3, 16, 16, generator=generator)
    batches = list(data[:128].split(32))
    known = tdc.calibrate(model, batches, progress=False)
    options: dict[str, Any] = {"budget": "params=0.5", "statistics": known, "progress": False}
    plain = tdc.compress(model, (data[:2],), **options)
    anchored = tdc.compress(model, (data[:2],), calibration=batches, **options)
    assert changed(model, anchored, data[128:]) < changed(model, plain, data[128:])


def test_iterators_anchor_like_lists_and_the_model_is_left_as_it_was() -> None:
    model, data = random_mlp((24, 40, 32, 16)), torch.randn(400, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = list(data.split(100))
    pair = [
        tdc.compress(model, budget="params=0.6", calibration=given, progress=False)
        for given in (batches, iter(batches))
    ]
    states = [small.state_dict() for small in pair]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_changing_run_sees_the_change_and_a_dense_one_does_not() -> None:
    model, x = random_mlp((6, 5, 4)), torch.randn(3, 6)
    program = NnProgram(model, (x,))
    sites, (batch,) = program.sites()[0], program.batches([(x,)])
    seen: list[tuple[int, Tensor, Tensor]] = []

    def visit(site: Site, activations: Any, beside: Any) -> Change | None:
        seen.append((site.order, *(a.clone() for a in activations)))
        return Change(torch.zeros(5, 6), torch.ones(5)) if site.order == 0 else None

    assert program.lockstep([batch], sites, visit) == ""
    assert [order for order, *_ in seen] == [0, 1]
    assert torch.equal(seen[0][1], seen[0][2])
    hidden = torch.relu(model[0].bias + 1).detach()
    assert torch.allclose(seen[1][2], hidden.expand(3, 5))
    assert torch.allclose(seen[1][1], torch.relu(model[0](x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_full_rank_anchored_fits_are_exact(dtype: torch.dtype) -> None:
    """Rounding of the layers before is no error to be fitted."""
    model, data = random_mlp((24, 40, 32, 16), dtype=dtype), torch.randn(400, 24, dtype=dtype)
    batches = list(data.split(100))
    known = tdc.calibrate(model, batches, progress=False)
    plan = tdc.plan(model, (data,), budget="params=0.9", statistics=known, allow="svd", progress=False)
    full = [replace(c, decomposition="svd", ranks=(("r", min(c.site.axes.values())),)) for c in plan.choices]
    options: dict[str, Any] = {"statistics": known, "calibration": batches, "progress": False}
    small = tdc.compress(model, (data,), plan=replace(plan, choices=tuple(full)), **options)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert tdc.report(small).replaced == 3
    assert all(site.weight_error <= bound**2 for site in tdc.report(small).sites)


def test_statistics_gathered_before_or_on_the_way_anchor_alike() -> None:
    model, data = random_mlp((24, 40, 32, 16)), torch.randn(400, 24)
    batches = list(data.split(100))
    known = tdc.calibrate(model, batches, progress=False)
    assert all(entry.important is not None for entry in known.sites)
    options: dict[str, Any] = {"budget": "params=0.6", "calibration": batches, "progress": False}
    pair = [tdc.compress(model, **options), tdc.compress(model, statistics=known, **options)]
    first, second = (small.state_dict() for small in pair)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_that_the_statistics_know_are_not_run_backwards_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = random_mlp((24, 40, 32, 16)), torch.randn(500, 24)
    batches, runs = list(data.split(100)), []
    tdc.calibrate(model, batches[:4], progress=False).save(tmp_path / "a.stats")
    gradients = NnProgram.gradients
    monkeypatch.setattr(NnProgram, "gradients", lambda *a: runs.append(a) or gradients(*a))
    known = tdc.Statistics.load(tmp_path / "a.stats")

    def fitted(known: tdc.Statistics, count: int) -> dict[str, Tensor]:
        options: dict[str, Any] = {"budget": "params=0.6", "progress": False, "statistics": known}
        return tdc.compress(model, (data[:1],), calibration=batches[:count], **options).state_dict()

    found = fitted(known, 4)
    assert not runs
    again = fitted(replace(known, importance=()), 4)
    assert len(runs) == 4
    assert all(torch.allclose(found[name], again[name], atol=1e-4) for name in found)
    fitted(known, 5)
    assert len(runs) == 5


@pytest.mark.parametrize("windows", [False, True])
def test_a_row_of_twice_the_importance_counts_as_two(windows: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (6, 4, 5, 5) if windows else (12, 4)
    x, z = (torch.randn(shape, generator=generator) for _ in range(2))
    layer = nn.Conv2d(4, 3, 3) if windows else nn.Linear(4, 3)
    (place,) = NnProgram(nn.Sequential(layer), (x,)).sites()[0]
    rows = 9 if windows else 1
    weights = torch.ones(len(x)).index_fill(0, torch.tensor([1, 3]), 2).repeat_interleave(rows)
    twice = torch.tensor([k for k in range(len(x)) for _ in range(2 if k in (1, 3) else 1)])
    pair, doubled = Pair.of(place, [x, z], [weights]), Pair.of(place, [x[twice], z[twice]])
    for name in ("drift", "own", "mean_x", "mean_z"):
        assert torch.allclose(getattr(pair, name), getattr(doubled, name), rtol=1e-5, atol=1e-6)
    assert pair.rows < doubled.rows


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_anchored_fit_is_the_optimum_of_the_shifted_problem(rank: int) -> None:
    """``min ||W X - W_hat Z||`` over all weights of a rank: what Z cannot explain, and the tail of ``W X P_Z``; up to
    the ridge of 1 % and the shrinkage.
    """
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(8, 6, bias=False)
    x = torch.randn(4000, 8, generator=generator)
    z = x + 0.3 * torch.tanh(x @ torch.randn(8, 8, generator=generator))
    (place,) = NnProgram(nn.Sequential(layer), (x,)).sites()[0]
    weight = layer.weight.detach().double()
    target, metric = Pair.of(place, [x, z]).target(weight, Metric("input", torch.eye(8, dtype=torch.float64)))
    found = low_rank(target, metric).approximation(rank).reshape(weight.shape)
    wanted, seen = weight @ x.double().T, z.double().T
    explained = torch.linalg.lstsq(seen.T, wanted.T).solution.T @ seen
    tail = torch.linalg.svdvals(explained)[rank:].square().sum()
    best = float((wanted - explained).square().sum() + tail)
    lost = float((wanted - found @ seen).square().sum())
    assert best * (1 - 1e-9) <= lost <= best * 1.01
    plain = low_rank(weight, Metric("input", x.double().T @ x.double())).approximation(rank).reshape(weight.shape)
    assert lost < float((wanted - plain @ seen).square().sum())


def test_batches_without_a_finite_row_in_the_cut_model_anchor_nothing() -> None:
    given = [torch.ones(3, 2), torch.full((3, 2), float("nan"))]
    pair = Pair.of(site(0), given)
    assert pair.rows == 0
    assert not pair.moved


def site(order: int) -> Site:
    return random_site(random_weight(3, 2), order=order)


def test_runs_in_different_orders_are_given_up_and_leave_no_thread() -> None:
    import threading

    def work(orders: list[int]) -> Any:
        return lambda meet: [meet(site(order), torch.zeros(1, 2), None) for order in orders]

    before = threading.active_count()
    visited: list[int] = []
    sites = [site(0), site(1), site(2)]
    reason = in_step([work([0, 1]), work([0, 2])], sites, lambda s, *_: visited.append(s.order))
    assert "one order" in reason
    assert visited == [0]
    assert "one order" in in_step([work([0, 1]), work([0])], sites, lambda s, *_: None)
    assert in_step([work([0, 1]), work([0, 1])], sites, lambda s, *_: None) == ""
    visited.clear()
    assert in_step([work([0, 1, 2]), work([0, 1, 2])], sites[:2], lambda s, *_: visited.append(s.order)) == ""
    assert visited == [0, 1]
    assert threading.active_count() == before


def test_a_failing_run_raises_what_it_raised() -> None:
    def work(meet: Meet) -> None:
        meet(site(0), torch.zeros(1, 2), None)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        in_step([work, work], [site(0), site(1)], lambda s, *_: None)
    with pytest.raises(ZeroDivisionError):
        in_step([work, work], [site(0), site(1)], lambda s, *_: 1 / 0)  # type: ignore[arg-type, return-value]


def test_a_model_whose_runs_take_other_ways_is_fitted_without_and_says_so() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0] > 0:
                return self.second(self.first(x).tanh())
            return self.first(self.second(x).tanh())

    x = torch.randn(64, 24)
    batches = [x.abs(), -x.abs()]
    small = tdc.compress(Forks().eval(), budget="params=0.6", calibration=batches, progress=False)
    report = tdc.report(small)
    assert report.replaced == 2
    assert any("do not reach the sites in one order" in remark.reason for remark in report.remarks)


@pytest.mark.parametrize("rows", [32, 64, 256])
def test_of_little_data_anchored_fits_make_more_too(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model, data = deep(generator), torch.randn(2000, 32, generator=generator)
    batches = list(data[:rows].split(rows // 4))
    known = tdc.calibrate(model, batches, progress=False)
    options: dict[str, Any] = {"budget": "params=0.8", "statistics": known, "allow": "pivoted", "progress": False}
    plain = tdc.compress(model, (data[:2],), **options)
    anchored = tdc.compress(model, (data[:2],), calibration=batches, **options)
    assert changed(model, anchored, data[rows:]) < changed(model, plain, data[rows:])
