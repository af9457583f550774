"""Budgets that name time: layers and layouts are timed, and what is slower than the dense layer is no candidate."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tdc
from tdc import targets
from tdc.errors import BudgetError, OptionError
from tdc.frontends.clock import copies_of
from tdc.frontends.fx import FxProgram
from tdc.frontends.fx.export import open_exported
from tdc.frontends.nn import NnProgram
from tdc.frontends.nn.timing import Stopwatch
from tdc.frontends.onnx import OnnxProgram, load_model
from tdc.frontends.onnx.timing import Stopwatch as OnnxStopwatch
from tdc.ir import Block, Site
from tdc.options import Options
from tdc.passes.base import Unit
from tdc.passes.pipeline import PROPOSING, Pipeline
from tdc.passes.propose_layouts import lowered
from tdc.planning.budget import Budget

DATA = [torch.randn(64, 48, generator=torch.Generator().manual_seed(k)) for k in range(6)]
RATE = 1e-9
OUTSIDE = 0.2
"""What part of a run is not in the sites."""


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 40)).eval()


class Fake:
    """A machine on which a gather costs as much as ``gather`` multiply-adds an entry, and everything else its
    multiply-adds.
    """

    def __init__(self, sites: Sequence[Site], gather: float = 0.0, slow: str = "") -> None:
        self.sites, self.gather, self.slow, self.asked = list(sites), gather, slow, 0

    def model(self) -> tuple[float, float]:
        return RATE * sum(site.params for site in self.sites) / (1 - OUTSIDE), 1 - OUTSIDE

    def key(self, site: Site) -> object:
        return site.sizes

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[object] = ()) -> list[float]:
        self.asked += 1
        factor = 10.0 if self.slow and self.slow in site.names else 1.0
        return [RATE * site.params, *(RATE * factor * self._work(block) for block in blocks)]

    def _work(self, block: Block) -> float:
        takes = sum(op.stop - op.start for op in block.ops if op.kind == "take")
        return block.macs + self.gather * takes


def on(monkeypatch: pytest.MonkeyPatch, **machine: Any) -> None:
    monkeypatch.setattr(NnProgram, "stopwatch", lambda self, sites, *_: Fake(tuple(sites), **machine))


def planned(budget: str, **options: Any) -> tdc.Plan:
    return tdc.plan(model(), DATA[0], budget=budget, calibration=DATA, progress=False, **options)


@pytest.mark.parametrize("latency", [0.9, 0.6])
def test_the_plan_keeps_within_the_time_of_the_whole_model(monkeypatch: pytest.MonkeyPatch, latency: float) -> None:
    on(monkeypatch)
    plan = planned(f"latency={latency}")
    dense = plan.dense_cost.seconds
    whole = dense / (1 - OUTSIDE)
    assert dense == pytest.approx(RATE * (48 * 96 + 96 * 96 + 96 * 40), rel=1e-3)
    assert whole - dense + plan.cost.seconds <= latency * whole * (1 + 1e-6)
    assert whole - dense + plan.cost.seconds > (latency - 0.1) * whole
    assert "time" in str(plan)
    assert plan.budget == f"latency={latency}"


def test_milliseconds_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    whole = RATE * (48 * 96 + 96 * 96 + 96 * 40) / (1 - OUTSIDE)
    by_share = planned("latency=0.7")
    in_ms = planned(f"latency_ms={0.7 * whole * 1e3}")
    assert [c.ranks for c in in_ms.choices] == [c.ranks for c in by_share.choices]


def test_what_is_slow_on_the_machine_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    allow = ("pivoted", "svd")
    assert {c.decomposition for c in planned("latency=0.6", allow=allow).choices if not c.is_dense} == {"pivoted"}
    on(monkeypatch, gather=40.0)
    assert {c.decomposition for c in planned("latency=0.6", allow=allow).choices if not c.is_dense} == {"svd"}


def test_what_is_slower_is_named_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, gather=10.0)
    told = {r.site: r.reason for r in planned("latency=0.8").remarks if r.stage == "time-layouts"}
    assert set(told) == {"0.weight", "2.weight", "4.weight"}
    for reason in told.values():
        name, ranks, share = re.findall(r"(pivoted/\w+) at r=(\d+) \((\d\.\d\d) of its time\)", reason)[0]
        assert name.startswith("pivoted/")
        assert int(ranks) > 0
        assert float(share) >= 0.98


def test_a_layer_that_nothing_makes_faster_stays_dense_and_the_remark_has_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, slow="2.weight")
    plan = planned("latency=0.8")
    assert [c.site.name for c in plan.choices if c.is_dense] == ["2.weight"]
    (remark,) = [r for r in plan.remarks if r.stage == "time-layouts" and "stays dense" in r.reason]
    assert remark.site == "2.weight"
    assert "of the dense time" in remark.reason


@pytest.mark.parametrize("inside", [0.9, 0.372788916, 0.0279043491, 0.0123456])
def test_a_limit_above_the_dense_time_is_kept_by_the_dense_model(
    monkeypatch: pytest.MonkeyPatch, inside: float
) -> None:
    on(monkeypatch)
    monkeypatch.setattr(Fake, "model", lambda fake: (1e-3, inside))
    monkeypatch.setattr(Fake, "site", lambda fake, site, blocks, kernels=(): [1.0] * (1 + len(blocks)))
    assert all(choice.is_dense for choice in planned("latency_ms=2").choices)


def test_what_cannot_be_reached_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    with pytest.raises(
        BudgetError, match=r"cannot be reached: a run takes .* 80% of that .* nearest one is latency="
    ) as e:
        planned("latency=0.1")
    near = str(e.value).rpartition("latency=")[2]
    assert not any(c.is_dense for c in planned(f"latency={near}").choices)


def test_limits_hold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    plan = planned("latency=0.9,params=0.4")
    assert plan.cost.params <= 0.4 * plan.dense_cost.params


def test_alike_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fake] = []
    monkeypatch.setattr(NnProgram, "stopwatch", lambda self, sites, *_: made.append(Fake(tuple(sites))) or made[-1])
    torch.manual_seed(2)
    same = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4))).eval()
    tdc.plan(same, DATA[0], budget="latency=0.8", allow="svd", calibration=DATA, progress=False)
    assert sum(fake.asked for fake in made) == 1


def test_plans_keep_the_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch)
    plan = planned("latency=0.7")
    again = tdc.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.cost.seconds == pytest.approx(plan.cost.seconds)
    small = tdc.compress(model(), DATA[0], plan=again, calibration=DATA, progress=False)
    assert tdc.report(small).after.seconds == pytest.approx(plan.cost.seconds)


def test_on_this_machine() -> None:
    dense = model()
    small = tdc.compress(dense, DATA[0], budget="latency_ms=1000", calibration=DATA, progress=False)
    told = [r.reason for r in tdc.report(small).remarks if r.stage == "time-layouts"]
    assert any("of the dense time" in reason and "ms" in reason for reason in told)
    assert any("replaced layers run on kernels" in r.reason for r in tdc.report(small).remarks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    program = NnProgram(dense, (DATA[0],))
    sites = program.sites()[0]
    watch = program.stopwatch(sites)
    assert isinstance(watch, Stopwatch)
    assert len({watch.key(site) for site in sites}) == 3
    seconds, part = watch.model()
    assert seconds > 0
    assert 0 < part <= 1
    assert len(watch.site(sites[0], [])) == 1


@pytest.mark.parametrize(
    ("size", "model", "copies"), [(1000, 1000, 1), (1000, 4500, 5), (1000, 10**9, 12), (10**9, 10**9, 1), (0, 0, 1)]
)
def test_layers_are_timed_as_cold_as_they_are_in_the_model(size: int, model: int, copies: int) -> None:
    assert copies_of(size, model) == copies


def test_a_kernel_counts_where_it_is_faster() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    program = NnProgram(net, (torch.randn(1, 256),))
    (site,) = program.sites()[0]
    options = Options("params=0.6", "weight", "cpu", (), (), "lagrangian", 0, False)
    unit = Pipeline(PROPOSING).run(Unit(program, targets.get("cpu"), options))
    candidates = [c for c in unit.candidates[0] if c.decomposition == "svd"]
    block = lowered(unit.target, candidates[len(candidates) // 2])[1]
    asked: list[tuple[int, ...]] = []

    def slow(x: torch.Tensor, factors: Any, bias: Any) -> torch.Tensor:
        asked.append(tuple(x.shape))
        time.sleep(0.002)
        return x

    watch = program.stopwatch((site,))
    assert watch.site(site, [block], [slow])[1] < 0.002
    assert set(asked) == {(1, 256)}
    asked.clear()
    fast = watch.site(site, [block], [lambda x, factors, bias: x])[1]
    assert fast < watch.site(site, [block], [None])[1]


def test_what_cannot_be_timed_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model(), (DATA[0],), path, dynamo=True, verbose=False, dynamic_shapes=(batch,))
    with pytest.raises(BudgetError, match="names time: that is measured on calibration data, since the file leaves"):
        tdc.plan(path, budget="latency=0.7", progress=False)
    with pytest.raises(BudgetError, match="allocation lagrangian"):
        planned("latency=0.7", allocation="uniform")
    with pytest.raises(BudgetError, match="do not go together"):
        tdc.pareto(model(), DATA[0], budgets=["latency=0.7", "params=0.5"], calibration=DATA, progress=False)


@pytest.mark.parametrize("given", [list, iter])
def test_open_sizes_are_timed_on_data_beside_statistics_gathered_before(tmp_path: Path, given: Any) -> None:
    path, data, sizes = tmp_path / "open.onnx", [{"input": x.numpy()} for x in DATA], ({0: torch.export.Dim("n")},)
    torch.onnx.export(model(), (DATA[0],), path, dynamo=True, verbose=False, dynamic_shapes=sizes)
    statistics = tdc.calibrate(path, data, progress=False)
    options: dict[str, Any] = {"budget": "latency=0.95", "statistics": statistics, "progress": False}
    report = tdc.compress_onnx(path, tmp_path / "small.onnx", calibration=given(data), **options)
    assert "the example takes" in str(report)


def mixed() -> nn.Sequential:
    """Convolutions with a normalisation behind one, an addition of a constant, and a product."""
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 40)).eval()


PICTURES = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def exported(net: nn.Module, example: torch.Tensor, path: Path) -> OnnxProgram:
    torch.onnx.export(net, (example,), path, dynamo=True, verbose=False)
    return OnnxProgram(load_model(path), path)


def captured(net: nn.Module, example: torch.Tensor) -> FxProgram:
    return open_exported(torch.export.export(net, (example,)))


@pytest.mark.parametrize("door", ["onnx", "fx"])
@pytest.mark.parametrize(("make", "data"), [(model, DATA), (mixed, PICTURES), (model, [x[None] for x in DATA])])
def test_the_other_doors_time_every_site_and_every_block_of_it(
    door: str, make: Any, data: list[torch.Tensor], tmp_path: Path
) -> None:
    program: Any = exported(make(), data[0], tmp_path / "m.onnx") if door == "onnx" else captured(make(), data[0])
    sites, _ = program.sites()
    watch = program.stopwatch(sites)
    seconds, part = watch.model()
    assert seconds > 0
    assert 0 < part <= 1
    assert len({watch.key(site) for site in sites}) == 3
    options = Options("params=0.6", "weight", "cpu", (), (), "lagrangian", 0, False)
    unit = Pipeline(PROPOSING).run(Unit(program, targets.get("cpu"), options))
    for site in sites:
        formats = {c.decomposition: c for c in unit.candidates[site.order] if not c.is_dense}
        blocks = [lowered(unit.target, candidate)[1] for candidate in formats.values()]
        taken = watch.site(site, blocks)
        assert len(taken) == 1 + len(blocks)
        assert all(0 < value < 1 for value in taken)


def test_more_work_takes_more_time_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 2048)).eval()
    program = exported(net, torch.randn(64, 32), tmp_path / "m.onnx")
    sites, _ = program.sites()
    watch = program.stopwatch(sites)
    assert isinstance(watch, OnnxStopwatch)
    small, _, large = (watch.site(site, [])[0] for site in sites)
    assert large > 10 * small  # of four thousand times the work
    assert watch.model()[1] > 0.5


@pytest.mark.parametrize("door", ["onnx", "fx", "torch.compile"])
def test_the_other_doors_plan_within_time(door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for program in (OnnxProgram, FxProgram):
        monkeypatch.setattr(program, "stopwatch", lambda self, sites, *_: Fake(tuple(sites)))
    if door == "onnx":
        path = tmp_path / "dense.onnx"
        torch.onnx.export(model(), (DATA[0],), path, dynamo=True, verbose=False)
        batches = [(batch.numpy(),) for batch in DATA]
        report = tdc.compress_onnx(path, tmp_path / "small.onnx", budget="latency=0.7", calibration=batches)
    elif door == "fx":
        program = torch.export.export(model(), (DATA[0],))
        small = tdc.compress_export(program, budget="latency=0.7", calibration=DATA, progress=False)
        report = tdc.report(small)
    else:
        options = {"budget": "latency=0.7", "calibration": DATA, "inner": "eager", "strict": True}
        compiled = torch.compile(model(), backend="tdc", options=options)
        with torch.no_grad():
            compiled(DATA[0])
        report = tdc.report(compiled)
    if door != "torch.compile":
        assert any("the example takes" in r.reason and "ms" in r.reason for r in report.remarks)
    dense = report.before.seconds
    whole = dense / (1 - OUTSIDE)
    assert dense == pytest.approx(RATE * (48 * 96 + 96 * 96 + 96 * 40), rel=1e-3)
    assert 0.6 * whole < whole - dense + report.after.seconds <= 0.7 * whole * (1 + 1e-6)


class Rows(Fake):
    """A machine on which few rows cost the reading of the weights, and more of them the multiply-adds."""

    def __init__(self, sites: Sequence[Site], batch: Any) -> None:
        super().__init__(sites, gather=4.0)
        self.rows = 64 if batch is None else len(batch[0][0])

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[object] = ()) -> list[float]:
        return [max(self.rows, 8) * seconds for seconds in super().site(site, blocks)]

    def model(self) -> tuple[float, float]:
        seconds, part = super().model()
        return max(self.rows, 8) * seconds, part


def test_several_examples_are_timed_each_as_often_as_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NnProgram, "stopwatch", lambda self, sites, batch=None: Rows(tuple(sites), batch))
    one, many = DATA[0][:1], DATA[0]
    plan = planned("latency=0.7", workload=[(many, 1), (one, 10)])
    macs = 48 * 96 + 96 * 96 + 96 * 40
    assert plan.dense_cost.seconds == pytest.approx(RATE * macs * (64 + 10 * 8), rel=1e-3)
    small = tdc.compress(model(), DATA[0], plan=plan, calibration=DATA, progress=False)
    assert tdc.report(small).after.seconds == pytest.approx(plan.cost.seconds)
    small = tdc.compress(
        model(), many, budget="latency=0.7", workload=[(many, 1), (one, 10)], calibration=DATA, progress=False
    )
    assert any("the workload of 2 examples takes" in r.reason for r in tdc.report(small).remarks)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (DATA[0][0], "takes pairs"),
        ([], "it is empty"),
        ([(DATA[0], 0)], "how often"),
        ([DATA[0]], "takes pairs"),
        ("once", "got str"),
    ],
)
def test_workloads_that_cannot_be_read(given: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        planned("latency=0.7", workload=given)


def test_a_workload_is_for_budgets_of_time() -> None:
    with pytest.raises(OptionError, match="goes with a budget such as"):
        planned("params=0.7", workload=[(DATA[0], 1)])


def test_a_file_is_timed_on_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model(), (DATA[0],), path, dynamo=True, verbose=False, dynamic_shapes=(batch,))
    mix = [((DATA[0][:1].numpy(),), 5), ((DATA[0].numpy(),), 1)]
    report = tdc.compress_onnx(
        path, tmp_path / "small.onnx", budget="latency_ms=1000", metric="weight", workload=mix, progress=False
    )
    assert any("the workload of 2 examples takes" in r.reason for r in report.remarks)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("latency=1.5", "above 0 and at most 1"),
        ("latency_ms=0", "must be above 0"),
        ("latency_ms=x", "not a number"),
        ("latency=min", "unknown quantity"),
        ("loss=0.1,latency=0.5", "what stays and the loss"),
        ("latancy=0.5", "did you mean 'latency'"),
    ],
)
def test_budgets_that_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        Budget.parse(text)


def test_budgets_of_time_print_as_they_are_read() -> None:
    for text in ("latency=0.7", "latency_ms=12", "params=0.5,latency=0.7"):
        assert str(Budget.parse(text)) == text
