"""Wrong input gives a typed error with a clear text; the model stays as it was and no file appears."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import (
    BudgetError,
    CalibrationError,
    DestinationError,
    ModelError,
    OptionError,
    PlanError,
    TdcError,
)
from tdc.testing import random_mlp

X = torch.zeros(4, 24)


def data() -> list[Tensor]:
    return [torch.randn(64, 24)]


def refused(error: type[TdcError], text: str, model: nn.Module | None = None, **options: Any) -> str:
    """The message with which compress refuses; the model is bit for bit what it was."""
    model = random_mlp() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"example_inputs": X, "progress": False, **options}
    with pytest.raises(error, match=text) as caught:
        tdc.compress(model, **options)
    assert type(caught.value) is error
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


def made_plan(model: nn.Module | None = None) -> tdc.Plan:
    return tdc.plan(model or random_mlp(), X, budget="params=0.6", progress=False)


# ---- options


def test_an_unknown_decomposition_is_refused_with_a_suggestion() -> None:
    refused(OptionError, "unknown decomposition 'svdd'; did you mean 'svd'", budget="params=0.5", allow="svdd")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"metric": "wieght"}, "unknown metric 'wieght'"),
        ({"target": "tpu"}, "unknown target 'tpu'. Known: auto, cpu"),
        ({"allocation": "fair"}, "unknown allocation 'fair'. Known: lagrangian, uniform, energy or energy=0.95, evbmf"),
        ({"allocation": None}, "unknown allocation None"),
        ({"allocation": "evbmf=3"}, "unknown allocation 'evbmf=3'"),
        ({"allocation": "energy=0"}, "'energy=0' needs a share of the squared norm above 0 and at most 1"),
        ({"allocation": "energy=nan"}, "'energy=nan' needs a share"),
        ({"seed": "0"}, "seed must be an integer"),
        ({"exclude": "7.weight"}, "fits no site; sites are named like"),
        ({"exclude": [1]}, "exclude must be a name"),
        ({"allow": [None]}, "allow must be a name"),
    ],
)
def test_an_unknown_option_value_is_refused_by_name(option: dict[str, Any], text: str) -> None:
    refused(OptionError, text, budget="params=0.5", **option)


@pytest.mark.parametrize("metric", ["input", "fisher"])
def test_a_metric_of_data_without_data_is_refused(metric: str) -> None:
    refused(OptionError, f"metric='{metric}' needs calibration= or statistics=", budget="params=0.5", metric=metric)


def test_a_budget_and_a_plan_together_or_neither_are_refused() -> None:
    refused(OptionError, "one of the two", budget="params=0.5", plan=made_plan())
    refused(OptionError, "one of the two")


@pytest.mark.parametrize("call", [tdc.plan, tdc.compress])
def test_a_model_without_example_or_data_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(OptionError, match="give example_inputs="):
        call(random_mlp(), budget="params=0.5", progress=False)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module; got str"):
        tdc.compress("model.onnx", X, budget="params=0.5")  # type: ignore[type-var]


def test_a_model_without_a_site_is_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3))
    text = refused(
        ModelError, "no site that can be decomposed", model, example_inputs=torch.zeros(1, 4, 9), budget="params=0.5"
    )
    assert "0.weight" in text


# ---- budgets


def test_a_bare_number_as_budget_is_refused_with_what_to_write() -> None:
    refused(BudgetError, re.escape("write budget='params=0.5'"), budget=0.5)


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}])
@pytest.mark.parametrize("budget", ["params=0.0001", "macs=0.001", "bytes=0.002", "params=0.01,macs=0.9"])
def test_an_unreachable_budget_names_the_nearest_one_and_that_one_works(budget: str, options: dict[str, str]) -> None:
    text = refused(BudgetError, "nearest reachable", budget=budget, **options)
    nearest = re.findall(r"(?:(?:params|bytes|macs)=[0-9.]+,?)+", text)[-1].rstrip(",.")
    small = tdc.compress(random_mlp(), X, budget=nearest, progress=False, **options)
    assert tdc.report(small).replaced == 2


# ---- calibration


def empty_generator() -> Any:
    yield from ()


@pytest.mark.parametrize("given", [[], (), empty_generator()], ids=["list", "tuple", "generator"])
def test_empty_calibration_is_refused(given: Any) -> None:
    refused(CalibrationError, "empty", budget="params=0.5", calibration=given)
    with pytest.raises(CalibrationError, match="empty"):
        tdc.calibrate(random_mlp(), given, progress=False)


@pytest.mark.parametrize(
    "given",
    [[torch.zeros(4, 23)], [torch.zeros(4, 24), torch.zeros(4, 25)], [{"wrong": X}], [torch.zeros(4, 24).long()]],
    ids=["width", "second-batch", "keyword", "dtype"],
)
def test_calibration_that_does_not_fit_is_refused(given: list[Any]) -> None:
    refused(CalibrationError, "cannot run on a batch", budget="params=0.5", calibration=given)


@pytest.mark.parametrize("given", [3, "data.pt", [3], ["x"], [None]], ids=repr)
def test_calibration_of_a_wrong_type_is_refused(given: Any) -> None:
    refused(CalibrationError, "must be", budget="params=0.5", calibration=given)


def test_calibration_without_a_finite_row_is_refused() -> None:
    refused(CalibrationError, "finite", budget="params=0.5", calibration=[torch.full((4, 24), float("nan"))])


def test_statistics_of_another_model_are_refused() -> None:
    known = tdc.calibrate(random_mlp(seed=5), data(), progress=False)
    refused(CalibrationError, "of another model", budget="params=0.5", statistics=known)


def test_statistics_of_a_wrong_type_are_refused() -> None:
    refused(OptionError, "takes what tdc.calibrate returns", budget="params=0.5", statistics={"a": 1})


# ---- plans


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(made_plan().to_json()), **changes})


def with_site(**changes: Any) -> str:
    rows = json.loads(made_plan().to_json())["sites"]
    return edited(sites=[{**rows[0], **changes}, *rows[1:]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a TDC plan"),
        (edited(format="x"), "not a TDC plan"),
        (edited(version=2), "version 2 cannot be read"),
        (edited(colour="red"), r"unknown keys in the plan: \['colour'\]"),
        (edited(sites=[3]), "site 0"),
        (with_site(ranks={"r": "many"}), r"site 0 \('0.weight'\) of the plan cannot be read"),
        (with_site(site={}), r"site 0 \('0.weight'\) of the plan cannot be read"),
        (with_site(colour="red"), "colour"),
        (with_site(ranks={"r": 0}), "0.weight .*rank r=0 is not in 1"),
        (with_site(ranks={"r": 25}), "0.weight .*rank r=25 is not in 1..24"),
        (with_site(ranks={"q": 3}), "0.weight .*ranks"),
        (with_site(variant="sideways"), "0.weight .*no variant 'sideways'"),
        (with_site(decomposition="svdd"), "0.weight.*svdd"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    refused(PlanError, message, plan=tmp_path / "plan.json")


def test_a_missing_plan_file_is_refused(tmp_path: Path) -> None:
    refused(PlanError, "cannot be read", plan=tmp_path / "none.json")


def test_a_plan_for_other_weights_is_refused_by_site() -> None:
    refused(PlanError, r"site 0.weight has another weight .*sketch does not fit", plan=made_plan(random_mlp(seed=5)))


def test_a_plan_for_another_shape_is_refused_by_site() -> None:
    plan = made_plan(random_mlp((24, 48, 16)))
    refused(PlanError, r"site 0.weight is linear 48x24, but here it is linear 40x24", plan=plan)


def test_a_plan_that_decides_twice_for_a_site_is_refused() -> None:
    plan = made_plan()
    refused(
        PlanError,
        "decides twice for 0.weight",
        plan=dataclasses.replace(plan, choices=(plan.choices[0], *plan.choices)),
    )


def test_a_plan_in_the_input_metric_needs_data() -> None:
    plan = tdc.plan(random_mlp(), budget="params=0.6", calibration=data(), progress=False)
    refused(CalibrationError, "the plan was made in the fisher metric: give statistics=", plan=plan)


# ---- files


@pytest.mark.parametrize("place", ["missing/model.tdc", "folder", "link.tdc"])
def test_a_destination_that_cannot_be_written_is_refused_and_nothing_appears(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link.tdc").symlink_to(tmp_path / "target")
    before = sorted(tmp_path.rglob("*"))
    small = tdc.compress(random_mlp(), X, budget="params=0.6", progress=False)
    known = tdc.calibrate(random_mlp(), data(), progress=False)
    for write in (lambda path: tdc.save(small, path), known.save):
        with pytest.raises(DestinationError, match=place.partition("/")[0]):
            write(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "target").read_text() == "precious"


def test_a_module_that_tdc_did_not_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not made by tdc"):
        tdc.save(random_mlp(), tmp_path / "a.tdc")
    with pytest.raises(ModelError, match="not made by tdc"):
        tdc.report(random_mlp())
    with pytest.raises(ModelError, match="no factored layer"):
        tdc.densify(random_mlp())
    assert list(tmp_path.iterdir()) == []


# ---- weights that cannot be decomposed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stays_dense_with_a_remark(value: float) -> None:
    model = random_mlp((24, 40, 16, 24))
    with torch.no_grad():
        model[2].weight[3, 5] = value
    small = tdc.compress(model, X, budget="params=0.6", allocation="uniform", progress=False)
    reasons = [r.reason for r in tdc.report(small).remarks if r.site == "2.weight"]
    assert reasons == ["1 of 640 entries of the weight are NaN or infinite"]
    assert type(small[2]) is nn.Linear
    assert {type(small[0]), type(small[4])} == {tdc.FactoredLinear}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_stays_dense_with_a_remark() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.empty = random_mlp(), nn.Linear(24, 0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.full(x), self.empty(x)

    small = tdc.compress(Two(), X, budget="params=0.6", progress=False)
    reasons = [r.reason for r in tdc.report(small).remarks if r.site == "empty.weight"]
    assert reasons == ["the weight of shape [0, 24] has no entries"]
    assert type(small.empty) is nn.Linear
