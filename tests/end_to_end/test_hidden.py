"""Fewer hidden units between layers, through all doors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tdc
from tdc.errors import PlanError
from tdc.frontends.clock import Run
from tdc.ir import Plan

pytestmark = pytest.mark.usefixtures("dynamo")
WIDTH, UNITS = 32, 96
BUDGET = "params=0.6"


class Gated(nn.Module):
    """``x + down(silu(gate(x)) * up(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, UNITS)
        self.up = nn.Linear(WIDTH, UNITS, bias=False)
        self.down = nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Plain(nn.Module):
    """``x + down(gelu(up(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, UNITS)
        self.down = nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def net() -> nn.Module:
    """Two blocks whose hidden units are 24 different ones, each there four times with noise."""
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Plain(), nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for block in model[:2]:
            for name in ("gate", "up"):
                layer = getattr(block, name, None)
                if layer is not None:
                    layer.weight.copy_(layer.weight[:24].repeat(4, 1) + 0.003 * torch.randn_like(layer.weight))
                    if layer.bias is not None:
                        layer.bias.copy_(layer.bias[:24].repeat(4) + 0.003 * torch.randn_like(layer.bias))
    return model.eval()


def data(seed: int = 1, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(512, WIDTH, generator=generator) for _ in range(batches)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


@pytest.fixture(scope="module")
def statistics(model: nn.Module) -> tdc.Statistics:
    return tdc.calibrate(model, data(), progress=False)


@pytest.fixture(scope="module")
def plan(model: nn.Module, statistics: tdc.Statistics) -> Plan:
    return tdc.plan(model, data()[0], budget=BUDGET, statistics=statistics, progress=False)


def lost(small: object, model: nn.Module) -> float:
    x = torch.cat(data(7))
    with torch.no_grad():
        reference = model(x)
        return float((small(x) - reference).square().mean() / reference.square().mean())  # type: ignore[operator]


def groups_of(plan: Plan) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for choice in plan.choices:
        if choice.hidden is not None:
            found.setdefault(choice.hidden.group, []).append(choice.site.name)
    return found


def test_the_layers_around_hidden_units_are_decided_together(plan: Plan) -> None:
    assert sorted(groups_of(plan).values()) == [
        ["0.gate.weight", "0.up.weight", "0.down.weight"],
        ["1.up.weight", "1.down.weight"],
    ]
    for choice in plan.choices:
        if choice.hidden is not None:
            assert choice.hidden.axis == ("i" if "down" in choice.site.name else "o")
            assert choice.cost.params < choice.dense_cost.params
    assert plan.cost.params <= 0.6 * plan.dense_cost.params


def test_a_module_with_fewer_units(model: nn.Module, statistics: tdc.Statistics, plan: Plan) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    widths = {c.site.name: c.hidden.width for c in plan.choices if c.hidden is not None}
    assert small[0].down.in_features == widths["0.down.weight"] == small[0].gate.out_features
    assert small[0].gate.bias.shape == (widths["0.gate.weight"],)
    assert lost(small, model) < 1e-3
    anyhow = tdc.compress(
        model, data()[0], budget=BUDGET, statistics=statistics, allow=("svd", "pivoted"), progress=False
    )
    assert lost(small, model) < 0.2 * lost(anyhow, model)
    told = {site.name: dict(site.kept) for site in tdc.report(small).sites}
    assert told["0.up.weight"] == {"o": widths["0.up.weight"]}
    assert told["2.weight"] == {}


def test_units_that_others_stand_in_for_cost_nothing(model: nn.Module) -> None:
    exact = net()
    with torch.no_grad():
        for layer in (exact[0].gate, exact[0].up, exact[1].up):
            layer.weight.copy_(layer.weight[:24].repeat(4, 1))
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[:24].repeat(4))
    statistics = tdc.calibrate(exact, data(batches=40), progress=False)
    plan = tdc.plan(exact, data()[0], budget="params=0.4", statistics=statistics, allow="interpolative", progress=False)
    small = tdc.compress(exact, data()[0], plan=plan, statistics=statistics, progress=False)
    assert min(c.hidden.width for c in plan.choices if c.hidden is not None) < UNITS // 2
    assert lost(small, exact) < 1e-4


def test_anchored_fits(model: nn.Module, statistics: tdc.Statistics, plan: Plan) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, calibration=data(), progress=False)
    assert lost(small, model) < 1e-3


def test_saved_and_loaded(model: nn.Module, statistics: tdc.Statistics, plan: Plan, tmp_path: Path) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    tdc.save(small, tmp_path / "small.tdc")
    again = tdc.load(tmp_path / "small.tdc", net())
    assert torch.equal(again(data()[0]), small(data()[0]))


def test_plain_layers_again(model: nn.Module, statistics: tdc.Statistics, plan: Plan) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    dense = tdc.densify(small)
    assert type(dense[0].up) is nn.Linear
    assert (dense[0].up.out_features, WIDTH) == dense[0].up.weight.shape
    assert torch.allclose(dense(data()[0]), small(data()[0]), atol=1e-5)


def test_an_exported_program(model: nn.Module, statistics: tdc.Statistics, plan: Plan) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    program = torch.export.export(model, (data()[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    made = tdc.compress_export(program, plan=plan, statistics=statistics, progress=False)
    made = made[0] if isinstance(made, tuple) else made
    assert torch.allclose(made.module()(data()[0][:7]), small(data()[0][:7]), atol=1e-4)


def test_healed(model: nn.Module, statistics: tdc.Statistics) -> None:
    small = tdc.compress(model, data()[0], budget="params=0.2", statistics=statistics, progress=False)
    before = lost(small, model)
    tdc.heal(small, model, data(), config=tdc.Heal(epochs=10, rate=5e-3), progress=False)
    assert lost(small, model) < 0.9 * before


def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert "o=" in str(plan)


def test_compiled(model: nn.Module, statistics: tdc.Statistics, plan: Plan) -> None:
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    compiled = torch.compile(net(), backend="tdc", options={"plan": plan, "statistics": statistics, "inner": "eager"})
    with torch.no_grad():
        compiled(data()[0])
        tdc.wait(compiled)
        assert torch.allclose(compiled(data()[0]), small(data()[0]), atol=1e-4)
        assert not torch.allclose(compiled(data()[0]), model(data()[0]), atol=1e-5)


def test_a_file(model: nn.Module, statistics: tdc.Statistics, plan: Plan, tmp_path: Path) -> None:
    torch.onnx.export(
        model,
        (data()[0],),
        tmp_path / "model.onnx",
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
    )
    small = tdc.compress(model, data()[0], plan=plan, statistics=statistics, progress=False)
    report = tdc.compress_onnx(
        tmp_path / "model.onnx", tmp_path / "small.onnx", plan=plan, statistics=statistics, progress=False
    )
    assert report.replaced == sum(not c.is_dense for c in plan.choices)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {"x": data()[0].numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), small(data()[0]), atol=1e-4)


def test_a_file_is_planned_with_fewer_units_too(model: nn.Module, tmp_path: Path) -> None:
    torch.onnx.export(model, (data()[0],), tmp_path / "model.onnx", input_names=["x"], dynamo=True)
    batches = [{"x": x.numpy()} for x in data()]
    statistics = tdc.calibrate(tmp_path / "model.onnx", batches, progress=False)
    plan = tdc.plan(tmp_path / "model.onnx", budget=BUDGET, statistics=statistics, progress=False)
    assert [len(group) for group in groups_of(plan).values()] == [3, 2]


@pytest.mark.parametrize("name", ["0.up.weight", "1.down.weight"])
def test_a_group_that_is_not_whole(model: nn.Module, statistics: tdc.Statistics, plan: Plan, name: str) -> None:
    broken = replace(plan, choices=tuple(c for c in plan.choices if c.site.name != name))
    with pytest.raises(PlanError, match="hidden units"):
        tdc.compress(model, data()[0], plan=broken, statistics=statistics, progress=False)


def test_units_that_something_else_reads_stay(statistics: tdc.Statistics) -> None:
    class Read(Plain):
        def forward(self, x: Tensor) -> Tensor:
            units = functional.gelu(self.up(self.norm(x)))
            return x + self.down(units) + units.mean(-1, keepdim=True)

    torch.manual_seed(0)
    model = nn.Sequential(Read(), nn.Linear(WIDTH, 10)).eval()
    known = tdc.calibrate(model, data(), progress=False)
    plan = tdc.plan(model, data()[0], budget=BUDGET, statistics=known, progress=False)
    assert not groups_of(plan)


def test_a_layer_that_is_left_out_keeps_its_units(model: nn.Module, statistics: tdc.Statistics) -> None:
    plan = tdc.plan(
        model, data()[0], budget="params=0.8", statistics=statistics, exclude="0.gate.weight", progress=False
    )
    assert all(not name.startswith("0.") for names in groups_of(plan).values() for name in names)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs once, and blocks take half the time of dense layers."""

    def taken(contestants: list[list[Run]]) -> list[float]:
        for runs in contestants:
            runs[0]()
        return [1.0, *[0.5] * (len(contestants) - 1)]

    monkeypatch.setattr("tdc.frontends.nn.timing.seconds_of", taken)
    monkeypatch.setattr("tdc.frontends.onnx.timing.seconds_of", lambda given: [0.0, *taken(given[1:])])


def test_a_budget_of_time(times: None, model: nn.Module, statistics: tdc.Statistics) -> None:
    budget = "params=0.5,latency=1.0"
    made = tdc.plan(
        model, data()[0], budget=budget, statistics=statistics, allow=("interpolative", "svd"), progress=False
    )
    assert [len(group) for group in groups_of(made).values()] == [3, 2]
    assert all(c.cost.seconds == 0.5 * c.dense_cost.seconds for c in made.choices if c.hidden is not None)


def test_a_budget_of_time_for_a_file(times: None, model: nn.Module, tmp_path: Path) -> None:
    torch.onnx.export(model, (data()[0],), tmp_path / "model.onnx", input_names=["x"], dynamo=True)
    batches = [{"x": x.numpy()} for x in data()]
    statistics = tdc.calibrate(tmp_path / "model.onnx", batches, progress=False)
    budget = "params=0.5,latency=1.0"
    made = tdc.plan(
        tmp_path / "model.onnx",
        batches[0],
        budget=budget,
        statistics=statistics,
        allow="interpolative",
        progress=False,
    )
    assert [len(group) for group in groups_of(made).values()] == [3, 2]
