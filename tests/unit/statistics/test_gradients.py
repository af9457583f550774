"""Output gradients: the loss that is differentiated, what is gathered, and that every door hands over the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import OptionError
from tdc.frontends.fx.export import open_exported
from tdc.frontends.nn import NnProgram
from tdc.ir import Site
from tdc.statistics import Gradients, Probe, damped, divergence, logits_among
from tdc.testing import random_cnn, random_mlp, random_site, random_weight

LOUD = torch.tensor([[9.0, 0.0, 1.0], [0.0, 8.0, 0.0]])


def test_logits_are_told_by_name_or_by_a_confident_softmax() -> None:
    quiet = torch.zeros(4, 5)
    assert logits_among({"logits": quiet, "loss": torch.zeros(())}) == "logits"
    assert logits_among({"output": LOUD}) == "output"
    assert logits_among({"output": quiet}) is None
    assert logits_among({"output": LOUD[:, :1]}) is None
    assert logits_among({"a": LOUD, "b": LOUD}) is None
    assert logits_among({"output": LOUD[None]}) is None


def test_the_gradients_of_the_probe_have_the_fisher_information_as_moment() -> None:
    """``E[g g^T] = diag(p) - p p^T``, as over cross entropies of labels drawn from p."""
    row = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)
    logits = row.expand(4000, 3).clone().requires_grad_()
    Probe("logits", 1)({"logits": logits}).backward()
    assert logits.grad is not None
    p = torch.softmax(row, 0)
    expected = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(logits.grad.T @ logits.grad / 4000, expected, atol=0.02)


def test_the_gradients_of_confident_rows_are_of_one_size_and_nothing_goes_where_nothing_is_likely() -> None:
    """Of drawn labels one in 1 / (1 - p) has a gradient of norm one, and the others next to none."""
    logits = torch.tensor([9.0, 0.0, -torch.inf, 0.0]).expand(500, 4).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Probe("logits", seed=3)({"logits": logits.clamp(min=-1e9)}), logits)
    p = torch.softmax(logits.detach()[0], -1)
    assert not gradient[:, 2].any()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(500), atol=1e-6, rtol=0)
    sizes = gradient.square().sum(1) / (1 - p.square().sum())
    assert 0.4 < float(sizes.min()) <= float(sizes.max()) < 1.7
    assert len({*(gradient[:, 1] > 0).tolist()}) == 2


def test_random_directions_have_the_relative_change_as_moment() -> None:
    """``E[g g^T] = n I / ||y||^2`` for one output y of n numbers."""
    outputs = {"y": torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()}
    total = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(2000):
        (gradient,) = torch.autograd.grad(Probe(None, seed)(outputs), outputs["y"])
        total += torch.outer(gradient, gradient) / 2000
    assert torch.allclose(total * 30 / 4, torch.eye(4, dtype=torch.float64), atol=0.15)


def test_the_same_seed_gives_the_same_loss() -> None:
    losses = [float(Probe("logits", seed)({"logits": torch.randn(50, 7, generator=_seeded())})) for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def taken(program: Any, batch: Any, loss: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def tap(site: Site, gradient: Tensor) -> None:
        found[site.order] = gradient.clone()

    assert program.gradients(next(program.batches([batch])), program.sites()[0], loss, tap) == ""
    return found


def test_a_program_hands_over_the_gradients_of_its_sites_outputs() -> None:
    model, x = random_mlp((6, 5, 4)), torch.randn(3, 6)
    first = model[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model[2](torch.relu(first)).square().sum(), first)
    found = taken(NnProgram(model, (x,)), (x,), lambda outputs: outputs["output"].square().sum())
    assert torch.allclose(found[0], expected, rtol=1e-6)
    assert torch.allclose(found[1], 2 * model(x), rtol=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_behind_a_folded_normalisation_and_equal_in_both_doors() -> None:
    model, x = random_cnn(dtype=torch.float64), torch.randn(2, 3, 12, 12, dtype=torch.float64)

    def loss(outputs: Any) -> Tensor:
        (only,) = outputs.values()
        return (only * torch.arange(1.0, 13.0, dtype=torch.float64)).sum()

    ours = taken(NnProgram(model, (x,)), (x,), loss)
    theirs = taken(open_exported(torch.export.export(model, (x,), strict=False)), (x,), loss)
    behind = model[1](model[0](x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss({"y": model[2:](behind)}), behind)
    assert torch.allclose(ours[0], expected, rtol=1e-10)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[order], theirs[order], rtol=1e-9, atol=1e-15) for order in ours)


def test_gradients_are_summed_over_rows_groups_apart_and_long_ones_clipped() -> None:
    gradients, site = Gradients(), random_site(random_weight(4, 6).reshape(4, 3, 2, 1), groups=2)
    given = torch.randn(5, 4, 3, 7, dtype=torch.float64)
    gradients.tap(site, given)
    rows = given.permute(0, 2, 3, 1).reshape(-1, 2, 2)
    assert torch.allclose(gradients.sums[0].total, torch.einsum("mga,mgb->gab", rows, rows))
    assert gradients.sums[0].rows == 5 * 3 * 7
    long = Gradients()
    many = torch.full((99, 3), 1e-3, dtype=torch.float64)
    long.tap(random_site(random_weight(3, 6)), torch.cat([many, torch.full((1, 3), 1e6, dtype=torch.float64)]))
    mean = (99 * 1e-3 + 1e6) / 100
    assert long.sums[0].total[0, 0, 0] == pytest.approx((10 * mean) ** 2, rel=1e-3)


def test_damping_keeps_the_trace_and_bounds_the_condition() -> None:
    gradient = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0))
    whole = damped(gradient)
    assert float(whole.trace()) == pytest.approx(30)
    assert float(torch.linalg.eigvalsh(whole)[0]) == pytest.approx(0.1 * 30 / 4)
    assert torch.equal(damped(torch.zeros(2, 3, 3)), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


class Teacher(nn.Module):
    """A confident classifier whose second half of hidden units hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 6)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.randn(32, 24, generator=generator))
            self.head.weight.copy_(2 * torch.randn(6, 32, generator=generator))
            self.head.weight[:, 16:] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def test_fits_in_the_fisher_metric_change_the_outputs_less_at_equal_ranks() -> None:
    generator = torch.Generator().manual_seed(5)
    model, data = Teacher().eval(), torch.randn(1200, 24, generator=generator)
    known = tdc.calibrate(model, [data[:1000]], progress=False)
    assert known.metric_name == "fisher"
    changes = []
    for metric in ("input", "fisher"):
        options: dict[str, Any] = {"metric": metric, "allow": "svd", "exclude": "head", "progress": False}
        small = tdc.compress(model, (data[:2],), budget="params=0.7", statistics=known, **options)
        assert tdc.report(small).metric == metric
        with torch.no_grad():
            changes.append(divergence({"y": model(data[1000:])}, {"y": small(data[1000:])}, "y"))
    assert changes[1] < 0.7 * changes[0]


def test_without_backward_runs_the_metric_is_that_of_the_inputs_and_says_so() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    x = torch.randn(64, 24)
    known = tdc.calibrate(Cut(), [x], progress=False)
    assert known.metric_name == "input"
    assert any("no output of the model has a gradient" in remark.reason for remark in known.remarks)
    with pytest.raises(OptionError, match="no output of the model has a gradient"):
        tdc.plan(Cut(), (x,), budget="params=0.5", statistics=known, metric="fisher", progress=False)


def test_calibration_without_gradients_on_demand() -> None:
    x = torch.randn(64, 24)
    known = tdc.calibrate(random_mlp(), [x], metric="input", progress=False)
    assert known.gradients == ()
    assert known.metric_name == "input"
    plan = tdc.plan(random_mlp(), (x,), budget="params=0.5", statistics=known, progress=False)
    assert plan.metric == "input"
    with pytest.raises(OptionError, match="these statistics have no output gradients"):
        tdc.plan(random_mlp(), (x,), budget="params=0.5", statistics=known, metric="fisher", progress=False)


def test_gradients_are_saved_and_loaded(tmp_path: Any) -> None:
    model, x = random_cnn(), torch.randn(16, 3, 12, 12)
    known = tdc.calibrate(model, [x], progress=False)
    known.save(tmp_path / "known")
    again = tdc.Statistics.load(tmp_path / "known")
    assert again.digest == known.digest
    assert [entry.important for entry in again.sites] == [entry.important for entry in known.sites]
    assert all(entry.important is not None for entry in again.sites)
    assert len(again.gradients) == len(known.sites) == 5
    assert [entry.gradient for entry in again.sites] == [entry.gradient for entry in known.sites]
    np.testing.assert_array_equal(again.gradients[1].numpy(), known.gradients[1].numpy())


def test_a_classifier_is_not_taken_for_cheap_since_its_last_direction_moves_all_logits_together() -> None:
    """Softmax does not see what all logits share: the first probe finds nothing, the second one finds the rest."""
    generator = torch.Generator().manual_seed(7)
    head = nn.Linear(32, 6)
    with torch.no_grad():
        head.weight.copy_(2 * torch.randn(6, 32, generator=generator))
        head.weight.sub_(head.weight.mean(0)).add_(0.05 * torch.randn(32, generator=generator))
        head.bias.zero_()
    known = tdc.calibrate(nn.Sequential(head).eval(), [torch.randn(512, 32, generator=generator)], progress=False)
    (entry,) = known.sites
    assert len(entry.probes) == 3
    assert entry.sensitivity_at(0.3) > 100 * entry.sensitivity
    plan = tdc.plan(nn.Sequential(head), (torch.randn(2, 32),), budget="params=0.9", statistics=known, progress=False)
    assert plan.choices[0].sensitivity == pytest.approx(entry.sensitivity_at(plan.choices[0].error), rel=1e-5)


def test_importance_is_the_squared_gradient_over_all_that_read_the_row() -> None:
    q, v = (random_site(random_weight(4, 6), order=order) for order in (0, 1))
    gathered = Gradients()
    first, second = torch.randn(50, 4, generator=_seeded()), torch.randn(50, 4, generator=_seeded()) * 2
    gathered.tap(q, first)
    gathered.tap(v, second)
    norm = first.double().square().sum(1) + second.double().square().sum(1)
    expected = 0.1 + 0.9 * (norm / norm.mean()).clamp(max=10)
    found = gathered.importance((0, 1))
    assert found is not None
    assert torch.allclose(found, expected, rtol=1e-6)
    assert gathered.importance(()) is None
    assert gathered.importance((0, 2)) is None  # the other one has no gradient
    gathered.tap(q, first)
    assert gathered.importance((0,)) is None  # two uses: which row is whose is not known


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rows_that_move_the_output_more_weigh_more_in_the_moment(kind: str) -> None:
    """Half of the examples meet a gate that is shut: the output does not depend on what the layer makes of them."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: nn.Module = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.layer(x) * gate

    shape = (64, 8) if kind == "linear" else (64, 8, 5, 5)
    x = torch.randn(shape, generator=_seeded())
    x[::2, 4:] = 0
    x[1::2, :4] = 0
    gate = (torch.arange(64) % 2).float().reshape(64, *([1] * (len(shape) - 1)))
    known = tdc.calibrate(Gated().eval(), [(x, gate)], progress=False)
    (entry,) = known.sites
    assert entry.important is not None
    place, rows = entry.important
    spread = known.moments[place].reshape(-1, entry.site.matrix[2]).diagonal().reshape(8, -1)
    assert float(spread[:4].sum()) < 0.1 * float(spread[4:].sum())
    assert 0.2 * entry.rows < rows < 0.8 * entry.rows
    plain = known.moments[entry.moment].reshape(-1, entry.site.matrix[2]).diagonal().reshape(8, -1)
    assert float(plain[:4].sum()) > 0.5 * float(plain[4:].sum())
    fisher, of_input = (known.metric(entry, torch.zeros(1), name, fitting=False) for name in ("fisher", "input"))
    assert fisher.second_moment is not None
    assert of_input.second_moment is not None
    assert not torch.allclose(fisher.second_moment, of_input.second_moment, rtol=0.1)
