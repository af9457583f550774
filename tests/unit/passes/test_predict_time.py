"""What plans say of time, and that a table of this machine is what lets them choose by it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tdc
from tdc import targets
from tdc.errors import OptionError
from tdc.frontends.nn.program import NnProgram
from tdc.ir import Plan
from tdc.ir.machine import Table, Timing, Work
from tdc.options import Options
from tdc.passes._clock import call_for, clock_of
from tdc.passes._seconds import members_seconds
from tdc.passes.base import Unit
from tdc.passes.pipeline import PLANNING, Pipeline
from tdc.passes.propose_layouts import lowered
from tdc.targets import Target
from tdc.targets.cpu import CPU
from tdc.testing import random_cnn, random_mlp

X = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
LINES = (1.0, 64.0, 1024.0)


def planned(target: Target, budget: str = "params=0.6", allow: tuple[str, ...] = ()) -> Plan:
    model = random_mlp((96, 160, 128))
    options = Options(budget, allow=allow, progress=False)
    plan = Pipeline(PLANNING).run(Unit(NnProgram(model, X), target, options, calibration=[X])).plan
    assert plan is not None
    return plan


def said(plan: Plan, site: str = "") -> list[str]:
    return [r.reason for r in plan.remarks if r.stage == "predict-time" and r.site == site]


def table(gather: float) -> Table:
    """Products in a time that goes with their multiply-adds, gathers in ``gather`` seconds."""
    products = {Work("gemm", (m, k, n)): 1e-6 + 2e-11 * m * k * n for m, k, n in itertools.product(LINES, LINES, LINES)}
    moves = {Work(kind, (m, n)): gather for kind in ("take", "concat", "add") for m in LINES for n in LINES}
    times = {**products, **moves, Work("launch", ()): 1e-6}
    return Table({"here": "yes"}, {work: Timing(t, t) for work, t in times.items()}, "2026-11-26")


def test_a_plan_states_the_time_of_its_sites_and_those_that_are_slower() -> None:
    slow = planned(CPU(table(gather=1.0)), allow=("pivoted",))
    (whole,) = said(slow)
    assert "of the dense time" in whole
    assert "(interpolated, by the times of this machine, 2026-11-26, table" in whole
    replaced = [choice for choice in slow.choices if not choice.is_dense]
    assert replaced
    for choice in replaced:
        (reason,) = said(slow, choice.site.name)
        assert reason.startswith("predicted ")
        assert reason.endswith("times the dense time at 64 rows (interpolated)")
        assert float(reason.split()[1]) > 100


def test_the_ratio_is_that_of_the_products() -> None:
    target = CPU(table(gather=1e-6))
    plan, clock = planned(target, allow=("svd",)), clock_of(target)
    assert clock is not None
    before = after = 0.0
    for choice in plan.choices:
        o, i, rows = choice.site.axes["o"], choice.site.axes["i"], call_for(choice).rows
        assert rows == 64
        dense = clock.work(Work("gemm", (rows, i, o))).seconds
        ranks = [float(rank) for _, rank in choice.ranks]
        new = sum(clock.work(Work("gemm", s)).seconds for r in ranks for s in ((rows, i, r), (rows, r, o)))
        before, after = before + dense, after + (new or dense)
    (whole,) = said(plan)
    assert f"{after / before:.3g} of the dense time, {1e3 * after:.3g} ms of {1e3 * before:.3g} ms" in whole


def test_a_slower_site_is_told_what_the_kernel_would_take() -> None:
    known = table(gather=1e-6)
    lines = (8.0, 128.0, 1024.0)
    sizes = itertools.product((1.0, 64.0), lines, lines, lines)
    kernel = {Work("two products", size): Timing(1e-9, 1e-9) for size in sizes}
    products = {w: Timing(1e-3, 1e-3) if w.kind == "gemm" else t for w, t in known.timings.items()}
    target = CPU(replace(known, timings={**products, **kernel}))
    plan = planned(target, allow=("svd",))
    slower = [text for choice in plan.choices if not choice.is_dense for text in said(plan, choice.site.name)]
    assert slower
    assert all(text.endswith(" with tdc.kernels.accelerate (interpolated)") for text in slower)


def test_without_a_table_the_description_speaks_and_decides_nothing() -> None:
    plain, described = planned(targets.get("cpu")), planned(targets.get("generic-cpu"))
    (whole,) = said(plain)
    assert "(modelled, by the description generic-cpu)" in whole
    assert said(described) == said(plain)
    assert replace(described, target="cpu") == plain


def test_a_budget_that_names_time_says_nothing_here() -> None:
    plan = tdc.plan(random_mlp((96, 160, 128)), X, budget="latency=0.999999", calibration=[X], progress=False)
    assert said(plan) == []


def test_with_a_table_a_slow_gather_is_left_where_another_layout_is_as_good() -> None:
    """Both plans keep the budget, and the one that knows times is predicted to be no slower."""
    fast, slow = CPU(table(gather=1e-9)), CPU(table(gather=1.0))
    plans = {target: planned(target, "params=0.9") for target in (fast, slow)}
    assert all(plan.cost.params <= 0.9 * plan.dense_cost.params for plan in plans.values())
    best = planned(targets.get("cpu"), "params=0.9")
    assert all(plan.loss <= 1.03 * 1.03 * best.loss for plan in plans.values())


def test_a_plan_for_a_described_target_is_applied_saved_and_loaded_without_its_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    source = Path(targets.__file__).with_name("near-memory-sketch.toml").read_text(encoding="utf-8")
    path.write_text(source.replace('id = "near-memory-sketch"', 'id = "board"').replace("value = 64", "value = 4"))
    model = random_mlp((96, 160, 128))
    plan = tdc.plan(model, X, budget="params=0.6", target=str(path), progress=False)
    assert plan.target.startswith("board@")
    assert not any(choice.decomposition == "pivoted" for choice in plan.choices), "the machine has no Gather"
    path.unlink()
    with pytest.raises(OptionError):
        tdc.plan(model, X, budget="params=0.6", target=str(path), progress=False)
    small = tdc.compress(model, X, plan=Plan.from_json(plan.to_json()), progress=False)
    tdc.save(small, tmp_path / "small.tdc")
    again = tdc.load(tmp_path / "small.tdc", model)
    assert torch.equal(again(X), small(X))
    assert tdc.report(again).target == plan.target


def test_small_ranks_are_not_proposed_where_the_machine_wants_larger_ones(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    source = Path(targets.__file__).with_name("generic-cpu.toml").read_text(encoding="utf-8")
    path.write_text(source.replace("least = { value = 1,", "least = { value = 40,"), encoding="utf-8")
    plan = tdc.plan(random_mlp((96, 160, 128)), X, budget="params=0.7", target=str(path), allow="svd", progress=False)
    assert all(rank >= 40 for choice in plan.choices for _, rank in choice.ranks)
    with pytest.raises(tdc.BudgetError, match="nearest reachable"):
        tdc.plan(random_mlp((96, 160, 128)), X, budget="params=0.2", target=str(path), allow="svd", progress=False)


def test_paths_of_a_plan(golden: Callable[[str], None]) -> None:
    plan = tdc.plan(
        random_mlp((96, 160, 160, 160)), X, budget="params=0.5", target="generic-cpu", calibration=[X], progress=False
    )
    golden(tdc.paths(plan))


def test_paths_of_convolutions(golden: Callable[[str], None]) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = random_cnn()
    plan = tdc.plan(
        model, images, budget="params=0.4", target="generic-cpu", allow=["tucker2", "spatial_svd"], progress=False
    )
    golden(tdc.paths(plan))


def test_paths_of_a_plan_that_replaces_nothing_and_of_a_file(tmp_path: Path) -> None:
    plan = planned(targets.get("cpu"))
    assert "  a call of 64 rows:" in tdc.paths(plan)
    assert tdc.paths(replace(plan, choices=())) == "the plan replaces no site"
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    assert tdc.paths(tmp_path / "plan.json") == tdc.paths(plan)
    with pytest.raises(tdc.PlanError):
        tdc.paths(tmp_path / "none.json")


def test_the_backend_looks_its_target_up_where_the_model_is_compiled() -> None:
    """Planning in the background uses one thread, and a table of another number of threads would be found there."""
    from tdc._settings import Settings

    assert Settings.parse({"budget": "params=0.5"}, None).machine is targets.get("auto")
    assert Settings.parse({"budget": "params=0.5", "target": "nvidia-h200"}, None).machine is targets.get("nvidia-h200")


def test_doors_that_know_lengths_and_those_that_do_not_decide_alike() -> None:
    target = CPU(table(gather=1e-6))
    plan = tdc.plan(random_cnn(), torch.randn(2, 3, 16, 16), budget="params=0.5", target="generic-cpu", progress=False)
    for choice in plan.choices:
        assert bool(choice.site.lengths) is choice.site.kind.is_conv
        blind = replace(choice, site=replace(choice.site, lengths=()))
        assert call_for(blind) == call_for(blind, told=False) == call_for(choice, told=False)
        assert members_seconds(target, [choice]) == members_seconds(target, [blind])
        if not choice.is_dense:
            assert lowered(target, choice) == lowered(target, blind)
