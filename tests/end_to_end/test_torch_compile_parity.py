"""One plan for three doors: modules, ONNX files and compiled graphs, on a trained transformer and on a small CNN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import _parts
from tdc.demo import Encoder, load_minilm, sentences
from tdc.ir import Plan
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
KEEP = "params=0.6"


class Case:
    """MiniLM with calibration and held-out batches, and statistics on disk."""

    def __init__(self, folder: Path) -> None:
        self.model, tokenizer = load_minilm()
        texts, encoder = sentences()[::10], Encoder(tokenizer, length=32)
        parts = (texts[:128], texts[192:224])
        self.calibration, self.held_out = (encoder.batches(part) for part in parts)
        statistics = tdc.calibrate(self.model, self.calibration, progress=False)
        self.path = folder / "stats.safetensors"
        statistics.save(self.path)

    def compiled(self, **options: Any) -> Any:
        return torch.compile(self.model, backend=tdc_backend, options={"inner": "eager", **options})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("compiled"))


def plan_of(compiled: nn.Module) -> Plan:
    ids = {id(parameter) for parameter in compiled.parameters()}
    *_, part = (part for part in _parts.parts() if any(id(ref()) in ids for ref in part.weights))
    assert part.outcome is not None
    return part.outcome.plan


def test_one_statistics_file_gives_equal_plans_and_equal_outputs(case: Case) -> None:
    plan = tdc.plan(case.model, case.calibration[0], budget=KEEP, statistics=case.path, progress=False)
    small = tdc.compress(case.model, case.calibration[0], plan=plan, statistics=case.path, progress=False)
    fast = case.compiled(budget=KEEP, statistics=case.path, strict=True)
    with torch.no_grad():
        for batch in case.held_out:
            found, expected = fast(**batch), small(**batch)
            assert float((found.last_hidden_state - expected.last_hidden_state).abs().max()) < 1e-4
            assert float((found.pooler_output - expected.pooler_output).abs().max()) < 1e-4
    assert plan_of(fast) == plan
    assert {site.name for site in tdc.report(fast).sites} == {choice.site.name for choice in plan.choices}
    assert tdc.report(fast).replaced == tdc.report(small).replaced >= 33


def test_a_plan_file_is_applied_as_by_the_module_door(case: Case, tmp_path: Path) -> None:
    plan = tdc.plan(case.model, case.calibration[0], budget=KEEP, statistics=case.path, progress=False)
    (tmp_path / "plan.json").write_text(plan.to_json())
    options = {"plan": tmp_path / "plan.json", "statistics": str(case.path)}
    small = tdc.compress(case.model, case.calibration[0], progress=False, **options)
    fast = case.compiled(**options, strict=True)
    with torch.no_grad():
        batch = case.held_out[0]
        difference = fast(**batch).last_hidden_state - small(**batch).last_hidden_state
    assert float(difference.abs().max()) < 1e-4


def test_eight_calls_lead_to_the_plan_of_the_same_eight_batches(case: Case) -> None:
    batches = case.calibration[:8]
    plan = tdc.plan(case.model, batches[0], budget=KEEP, calibration=batches, progress=False)
    fast = case.compiled(budget=KEEP, calibrate_calls=8)
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(fast(**batch).last_hidden_state, case.model(**batch).last_hidden_state)
        tdc.wait(fast, timeout=300)
        assert not torch.equal(fast(**batch).last_hidden_state, case.model(**batch).last_hidden_state)
    mine = plan_of(fast)
    assert [(c.site.name, c.decomposition, c.ranks) for c in mine.choices] == [
        (c.site.name, c.decomposition, c.ranks) for c in plan.choices
    ]


class Cnn(nn.Module):
    """Convolutions with normalisation of three makes, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 24, 3, padding="same"), nn.BatchNorm2d(24)
        self.b, self.norm_b = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.c, self.head = nn.Conv2d(32, 48, 1), nn.Linear(48, 10)
        for norm in (self.norm_a, self.norm_b):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm_a(self.a(x)).relu(), 2)
        x = self.c(self.norm_b(self.b(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("metric", ["input", "weight"])
def test_convolutions_with_normalisation_are_planned_and_run_alike(metric: str, tmp_path: Path) -> None:
    model, batches = Cnn().eval(), [torch.randn(12, 3, 16, 16) for _ in range(4)]
    data: dict[str, Any] = {}
    if metric == "input":
        tdc.calibrate(model, batches, progress=False).save(tmp_path / "stats")
        data = {"statistics": tmp_path / "stats"}
    plan = tdc.plan(model, batches[0], budget="params=0.5", progress=False, **data)
    small = tdc.compress(model, batches[0], plan=plan, progress=False, **data)
    options = {"budget": "params=0.5", "inner": "eager", "strict": True, **data}
    fast = torch.compile(model, backend=tdc_backend, options=options)
    with torch.no_grad():
        for count in (12, 5):
            x = torch.randn(count, 3, 16, 16)
            assert float((fast(x) - small(x)).abs().max()) < 1e-4
    assert plan_of(fast) == plan
    norms = {choice.site.name: choice.site.norm for choice in plan_of(fast).choices}
    assert norms == {"a.weight": "norm_a", "b.weight": "norm_b", "c.weight": "", "head.weight": ""}


def test_exported_programs_are_planned_alike(tmp_path: Path) -> None:
    model, batches = Cnn().eval(), [torch.randn(12, 3, 16, 16) for _ in range(4)]
    statistics = tdc.calibrate(model, batches, progress=False)
    plan = tdc.plan(model, batches[0], budget="params=0.5", statistics=statistics, progress=False)
    program = torch.export.export(model, (batches[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    small = tdc.compress_export(program, budget="params=0.5", statistics=statistics, progress=False)
    expected = tdc.compress(model, batches[0], plan=plan, statistics=statistics, progress=False)
    assert [(s.name, s.ranks) for s in tdc.report(small).sites] == [
        (s.name, s.ranks) for s in tdc.report(expected).sites
    ]
    with torch.no_grad():
        assert float((small.module()(batches[1]) - expected(batches[1])).abs().max()) < 1e-5
