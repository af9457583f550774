"""Modules as users write them: several readers, lists of layers, ties, hooks, attributes, state, edited plans."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import BudgetError, ModelError, PlanError

WIDTH, UNITS = 64, 128


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Linear(UNITS, WIDTH)).eval()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.main, self.aux = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH), nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor, task: str = "main") -> Tensor:
        hidden = torch.relu(self.trunk(x))
        return self.main(hidden) if task == "main" else self.aux(hidden)


@pytest.mark.parametrize("how", ["without data", "weight", "auto"])
def test_hidden_units_that_another_run_reads_stay_as_they_are(how: str) -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().eval(), torch.randn(512, WIDTH)
    data = [{"x": x, "task": "main"}, {"x": x, "task": "aux"}]
    keywords: dict[str, Any] = {} if how == "without data" else {"calibration": data, "metric": how}
    small = tdc.compress(model, {"x": x}, budget="params=0.95", progress=False, **keywords)
    with torch.no_grad():
        assert apart(small(x), model(x)) < 0.3
        assert apart(small(x, task="aux"), model(x, task="aux")) < 0.3  # 1.1 with units in another order


def test_where_calibration_meets_both_readers_units_stay(lowrank: Callable[[nn.Module], None]) -> None:
    """The example reaches all layers, each of the batches one reader only."""

    class Either(TwoHeads):
        def forward(self, x: Tensor, task: str = "both") -> Tensor:
            hidden = torch.relu(self.trunk(x))
            parts = [self.main(hidden)] if task != "aux" else []
            return sum(parts + ([self.aux(hidden)] if task == "aux" else []), torch.zeros(()))

    torch.manual_seed(0)
    model, x = Either().eval(), torch.randn(512, WIDTH)
    lowrank(model)
    data = [{"x": x, "task": "main"}, {"x": x, "task": "aux"}]
    small = tdc.compress(model, {"x": x}, budget="params=0.4", calibration=data, progress=False)
    with torch.no_grad():
        for task in ("main", "aux"):
            assert apart(small(x, task=task), model(x, task=task)) < 0.5


def test_hooks_between_layers_see_all_units_in_their_order() -> None:
    model, x, seen = mlp(), torch.randn(512, WIDTH), list[Tensor]()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    small = tdc.compress(model, x, budget="params=0.6", calibration=[x], progress=False)
    seen.clear()
    with torch.no_grad():
        model(x), small(x)
    assert seen[1].shape == seen[0].shape
    assert apart(seen[1], seen[0]) < 0.7  # 1.4 in another order


def test_layers_in_lists_and_dicts_are_exchanged_too(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.steps = [self.a, (torch.relu, {"last": self.b})]

        def forward(self, x: Tensor) -> Tensor:
            first, (act, rest) = self.steps
            return rest["last"](act(first(x)))  # type: ignore[operator, index]

    torch.manual_seed(0)
    model, x = Steps().eval(), torch.randn(64, WIDTH)
    small = tdc.compress(model, x, budget="params=0.3", progress=False)
    with torch.no_grad():
        assert apart(small(x), model(x)) > 0.1
        assert apart(small(x), tdc.densify(small)(x)) < 1e-5
        tdc.save(small, tmp_path / "small.tdc")
        assert torch.equal(tdc.load(tmp_path / "small.tdc", Steps())(x), small(x))


def test_biases_that_were_tied_come_back_each_with_its_own_values(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x)))
            return out

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(256, WIDTH)
    for keywords in ({}, {"calibration": [x]}):
        small = tdc.compress(model, x, budget="params=0.5", progress=False, **keywords)  # type: ignore[arg-type]
        tdc.save(small, tmp_path / "small.tdc")
        with torch.no_grad():
            assert torch.equal(tdc.load(tmp_path / "small.tdc", model)(x), small(x))


@pytest.mark.parametrize("x", [torch.randn(1, WIDTH), torch.ones(256, WIDTH)], ids=["one row", "rows alike"])
def test_calibration_rows_that_are_all_alike(x: Tensor) -> None:
    model = mlp()
    small = tdc.compress(model, x, budget="params=0.5", calibration=[x], progress=False)
    assert max(float(p.detach().abs().max()) for p in small.parameters()) < 100
    with torch.no_grad():
        assert apart(small(x), model(x)) < 0.01


def test_attributes_and_hooks_of_a_replaced_layer_stay() -> None:
    class Marked(nn.Linear):
        scale = 0.5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(16, 32, 3, stride=2, padding=1), Marked(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            lengths = x.shape[-1] // self.conv.stride[0]
            hidden = torch.relu(self.conv(x)).mT[:, :lengths]
            out: Tensor = self.head(hidden) * self.head.scale
            return out

    torch.manual_seed(0)
    model, x, seen = Net().eval(), torch.randn(4, 16, 20), list[str]()
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.head.register_state_dict_post_hook(lambda *_: seen.append("state"))
    small = tdc.compress(model, x, budget="params=0.4", progress=False)
    assert all(type(layer) not in (nn.Conv1d, Marked) for layer in small.children())
    small(x).sum().backward()
    small.state_dict()
    assert seen == ["backward", "state"]


def test_a_layer_with_a_forward_of_its_own_stays() -> None:
    model, x = mlp(), torch.randn(64, WIDTH)
    layer = model[0]
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    small = tdc.compress(model, x, budget="params=0.5", progress=False)
    assert [site.name for site in tdc.report(small).sites] == ["2.weight"]


def test_layers_that_share_are_right_whichever_is_called() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, UNITS))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.a(x)) + torch.sigmoid(self.b(x)), self.c(x)

    torch.manual_seed(0)
    model, x = Heads(), torch.randn(200, WIDTH)
    alike = torch.randn(4 * WIDTH, 16) @ torch.randn(16, WIDTH) / 30
    with torch.no_grad():
        for layer, own in zip((model.a, model.b, model.c), alike.split([WIDTH, WIDTH, UNITS]), strict=True):
            layer.weight.copy_(own + 0.01 * torch.randn_like(own))
    small = tdc.compress(model, x, budget="params=0.3", calibration=[x], progress=False)
    assert any(site.joint for site in tdc.report(small).sites)
    dense: Any = tdc.densify(small)
    with torch.inference_mode():
        buffer = torch.zeros(8, WIDTH)
        for _ in range(3):
            buffer.copy_(torch.randn(8, WIDTH))
            assert apart(small.b(buffer), dense.b(buffer)) < 1e-5
    features = torch.randn(8, WIDTH)
    for net in (dense, small):  # two losses, one after the other, on the same features
        net.a(features).square().mean().backward()
        net.b(features).square().mean().backward()


def test_the_model_and_the_data_are_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, past: Any = None) -> Tensor:
            self.calls = self.calls + 1
            if past is not None:
                past.lengths.append(len(x))
            out: Tensor = self.layer(x)
            return out

    class Past:
        def __init__(self) -> None:
            self.lengths = [3]

    model, x, past = Counting().eval(), torch.randn(64, WIDTH, requires_grad=True), Past()
    tdc.compress(
        model, {"x": x, "past": past}, budget="params=0.5", calibration=[{"x": x, "past": past}], progress=False
    )
    assert float(model.calls) == 0
    assert x.grad is None
    assert past.lengths == [3]


@pytest.fixture
def lowrank() -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
                u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(u * s[0] * torch.exp(-torch.arange(float(len(s))) / 16) @ v)

    return change


def test_a_plan_is_edited_to_dense_or_to_another_metric(lowrank: Callable[[nn.Module], None]) -> None:
    model, x = mlp(), torch.randn(256, WIDTH)
    lowrank(model)
    statistics = tdc.calibrate(model, [x], progress=False)
    plan = tdc.plan(model, x, budget="params=0.3", statistics=statistics, progress=False)
    assert any(choice.hidden for choice in plan.choices)
    dense = {"decomposition": "dense", "variant": "", "ranks": {}}

    def applied(edit: Callable[[dict[str, Any]], None]) -> nn.Module:
        text = json.loads(plan.to_json())
        edit(text)
        edited = tdc.Plan.from_json(json.dumps(text))
        return tdc.compress(model, x, plan=edited, statistics=statistics, progress=False)

    for site in (0, 1):
        with pytest.raises(PlanError, match="hidden units"):
            applied(lambda text, k=site: text["sites"][k].update(dense))  # type: ignore[misc]
    with pytest.raises(PlanError, match="metric"):
        applied(lambda text: text.update(metric="weight"))
    both = applied(lambda text: [row.update(dense) for row in text["sites"]] and None)
    with torch.no_grad():
        assert apart(both(x), model(x)) < 1e-6


def test_budgets_of_loss_where_nothing_can_be_replaced() -> None:
    x = torch.randn(16, 2)
    for keywords in ({"budget": "loss=0.01"}, {"evaluate": lambda model: 1.0, "metric_drop": 0.1}):
        with pytest.raises(BudgetError, match="nothing"):
            tdc.compress(nn.Sequential(nn.Linear(2, 2)), x, calibration=[x], progress=False, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["params=0.12", "loss=0.5", "loss=1000"])
def test_groups_that_cannot_be_as_small_as_their_sites_do_not_bound_a_budget(budget: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24)).eval()
    data = [torch.randn(32, 24) for _ in range(4)]
    small = tdc.compress(model, data[0], budget=budget, calibration=data, progress=False)
    report = tdc.report(small)
    assert report.after.params <= 0.12 * report.before.params or budget == "loss=0.5"


def test_a_search_goes_on_where_fits_lose_it_all() -> None:
    torch.manual_seed(11)
    layers = [nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
    data = [torch.randn(32, 24) for _ in range(4)]
    small = tdc.compress(nn.Sequential(*layers).eval(), data[0], budget="loss=0.5", calibration=data, progress=False)
    assert tdc.report(small).replaced


@pytest.mark.usefixtures("dynamo")
def test_reports_are_of_the_compilation_that_is_asked() -> None:
    model, x = mlp(), torch.randn(16, WIDTH)
    compiled = {}
    for budget in ("params=0.8", "params=0.4"):
        torch._dynamo.reset()
        compiled[budget] = torch.compile(model, backend="tdc", options={"budget": budget, "inner": "eager"})
        with torch.no_grad():
            compiled[budget](x)
    for budget, fast in compiled.items():
        report = tdc.report(fast)
        assert (report.budget, len(report.sites)) == (budget, 2)


@pytest.mark.usefixtures("dynamo")
def test_a_model_whose_weights_were_released_cannot_be_copied() -> None:
    model, x = mlp(), torch.randn(16, WIDTH)
    options = {"budget": "params=0.5", "inner": "eager", "release_weights": True}
    fast = torch.compile(model, backend="tdc", options=options)
    with torch.no_grad():
        fast(x)
    with pytest.raises(ModelError, match="released"):
        copy.deepcopy(model)
