"""Laws that every pass of the pipeline keeps. A new pass is tested on arrival."""

from __future__ import annotations

import pkgutil
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc.passes
from tdc import targets
from tdc.errors import VerificationError
from tdc.frontends.nn import NnProgram
from tdc.options import Options
from tdc.passes.base import Pass, Unit
from tdc.passes.pipeline import APPLYING, COMPRESSING, PLANNING, REALIZING, Pipeline
from tdc.testing import random_mlp

PASSES = {step.name: step for step in (*COMPRESSING, *APPLYING)}
NOT_PASSES = {"base", "pipeline"}


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(32, 24, generator=generator) for _ in range(2)]


def opened(model: nn.Module, *, inplace: bool = False, **options: Any) -> Unit:
    program = NnProgram(model, data()[0], inplace=inplace)
    asked = Options(**{"budget": "params=0.6", "progress": False, **options})
    return Unit(program, targets.get("cpu"), asked, calibration=data())


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """All that a pass could change in a model: tensors, modules, modes, hooks."""
    tensors = [(name, t.data_ptr(), t.clone()) for name, t in model.state_dict().items()]
    modules = [
        (name, id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()
    ]
    return (*((name, place, tuple(t.flatten().tolist())) for name, place, t in tensors), *modules)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_the_name_of_its_file(name: str) -> None:
    assert type(PASSES[name]).__module__ == f"tdc.passes.{name.replace('-', '_')}"


def test_every_file_of_the_folder_is_a_pass_of_the_pipeline() -> None:
    names = [info.name for info in pkgutil.iter_modules(tdc.passes.__path__)]
    files = {name.replace("_", "-") for name in names if not name.startswith("_")}
    assert files - NOT_PASSES == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_value(name: str) -> None:
    step = PASSES[name]
    assert step == type(step)()
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        step.name = "other"  # type: ignore[misc]


def test_only_the_last_pass_touches_the_model() -> None:
    for passes in (COMPRESSING, APPLYING):
        assert [step.touches_model for step in passes] == [False] * (len(passes) - 1) + [True]
        assert not any(step.touches_model for step in PLANNING)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_users_model_is_the_same_after_every_pass_that_does_not_touch_it(inplace: bool) -> None:
    model = random_mlp().train()
    before, checked = fingerprint(model), []

    def compare(step: Pass, unit: Unit, seconds: float) -> None:
        if not (step.touches_model and inplace):
            assert fingerprint(model) == before, f"{step.name} changed the model"
            checked.append(step.name)
        assert seconds >= 0

    Pipeline(COMPRESSING, after=compare).run(opened(model, inplace=inplace))
    assert len(checked) == len(COMPRESSING) - inplace
    assert (fingerprint(model) == before) is not inplace


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_gives_the_same_answer_twice(name: str) -> None:
    """Each pass is run a second time on the very unit that it got."""
    for passes in (COMPRESSING, APPLYING):
        unit = opened(random_mlp())
        if passes is APPLYING:
            unit = unit.having(plan=Pipeline(PLANNING).run(unit).plan)
        for step in passes:
            after = step.run(unit)
            if step.name == name and not step.touches_model:
                again = step.run(unit)
                assert summary(again) == summary(after)
            unit = after


def summary(unit: Unit) -> tuple[object, ...]:
    digest = unit.statistics.digest if unit.statistics is not None else ""
    plan = unit.plan.to_json() if unit.plan is not None else ""
    factors = {(order, key): f.tolist() for order, fs in unit.factors.items() for key, f in fs.items()}
    return unit.sites, unit.candidates, plan, digest, factors, unit.errors, unit.blocks, unit.remarks


def test_planning_twice_gives_the_same_plan() -> None:
    unit = opened(random_mlp())
    first, second = Pipeline(PLANNING).run(unit).plan, Pipeline(PLANNING).run(unit).plan
    assert first is not None
    assert second is not None
    assert first.to_json() == second.to_json()


def test_a_plan_and_its_own_application_decide_the_same() -> None:
    planned = Pipeline(COMPRESSING).run(opened(random_mlp()))
    applied = Pipeline(APPLYING).run(opened(random_mlp()).having(plan=planned.plan))
    assert applied.plan == planned.plan
    assert applied.blocks == planned.blocks
    assert applied.errors == planned.errors


def test_every_remark_names_its_pass_and_a_reason() -> None:
    unit = Pipeline(COMPRESSING).run(opened(random_mlp((24, 40, 16, 1))))
    assert unit.remarks
    assert all(remark.stage in PASSES and remark.reason for remark in unit.remarks)


def test_a_pass_that_exchanges_the_program_is_caught() -> None:
    class Thief(Pass):
        name = "thief"

        def run(self, unit: Unit) -> Unit:
            return unit.having(program=NnProgram(random_mlp(), data()[0]))

    with pytest.raises(VerificationError, match="thief has exchanged the program"):
        Pipeline((Thief(),)).run(opened(random_mlp()))


def test_a_pass_that_secretly_makes_a_result_is_caught() -> None:
    class Sly(Pass):
        name = "sly"

        def run(self, unit: Unit) -> Unit:
            return unit.having(result=random_mlp())

    with pytest.raises(VerificationError, match="sly made a result"):
        Pipeline((Sly(),)).run(opened(random_mlp()))


def test_contracts_are_run_around_a_pass() -> None:
    calls = []

    class Careful(Pass):
        name = "careful"

        def requires(self, unit: Unit) -> None:
            calls.append("requires")

        def run(self, unit: Unit) -> Unit:
            calls.append("run")
            return unit

        def ensures(self, before: Unit, after: Unit) -> None:
            calls.append("ensures")

    Pipeline((Careful(),)).run(opened(random_mlp()))
    assert calls == ["requires", "run", "ensures"]


def test_fitting_without_a_plan_is_refused() -> None:
    with pytest.raises(VerificationError, match="needs a plan"):
        Pipeline(REALIZING).run(opened(random_mlp()))
