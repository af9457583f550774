from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdc
from tdc.errors import PlanError
from tdc.ir import DENSE, METRICS, Candidate, Cost, OpKind, Plan, Remark, Site
from tdc.testing import random_mlp, random_site, random_weight

FINITE = st.floats(0, 1e6, allow_nan=False)


def example() -> Plan:
    first = random_site(random_weight(12, 8), name="a.weight")
    second = random_site(random_weight(9, 8), order=1, name="b.weight")
    choices = (
        Candidate(first, "svd", "", (("r", 3),), 0.125, 2.0, Cost(60, 240, 60.0), Cost(96, 384, 96.0)),
        Candidate(second, DENSE, cost=Cost(72, 288, 72.0), dense_cost=Cost(72, 288, 72.0)),
    )
    return Plan(
        choices, "weight", "", "cpu", "params=0.8", remarks=(Remark("b.weight", "choose-plan", "too precious"),)
    )


def renamed(site: Site, name: str) -> Site:
    return dataclasses.replace(site, names=(name,), order=site.order + 7)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(st.text(min_size=1, max_size=8), max_size=3))
    choices = []
    for k, name in enumerate(names):
        site = random_site(random_weight(3 + k, 5), order=k, name=name)
        ranks = tuple(draw(st.dictionaries(st.sampled_from("rstq"), st.integers(1, 99), max_size=2)).items())
        costs = [Cost(draw(st.integers(0, 10**9)), draw(st.integers(0, 10**9)), draw(FINITE)) for _ in range(2)]
        choices.append(
            Candidate(
                site, draw(st.text(max_size=5)), draw(st.text(max_size=3)), ranks, draw(FINITE), draw(FINITE), *costs
            )
        )
    remarks = tuple(Remark(*draw(st.tuples(st.text(), st.text(), st.text()))) for _ in names)
    return Plan(
        tuple(choices),
        draw(st.sampled_from(METRICS)),
        draw(st.text(max_size=5)),
        seed=draw(st.integers(0, 99)),
        remarks=remarks,
    )


def everything(plan: Plan) -> str:
    """All fields, those too that do not count for equality."""
    return repr(dataclasses.asdict(plan))


@given(plans())
def test_writing_and_reading_is_the_identity(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert everything(again) == everything(plan)
    assert again.to_json() == plan.to_json()


def test_plans_are_equal_whatever_the_names_and_the_order() -> None:
    plan = example()
    choices = tuple(dataclasses.replace(c, site=renamed(c.site, "other"), error=0.5) for c in reversed(plan.choices))
    assert dataclasses.replace(plan, choices=choices, remarks=()) == plan
    assert hash(dataclasses.replace(plan, choices=choices)) == hash(plan)


@pytest.mark.parametrize(
    "change", [{"metric": "input"}, {"statistics": "ab"}, {"target": "gpu"}, {"budget": "params=0.7"}, {"choices": ()}]
)
def test_plans_that_decide_otherwise_are_unequal(change: dict[str, object]) -> None:
    assert dataclasses.replace(example(), **change) != example()  # type: ignore[arg-type]


def test_another_rank_or_another_weight_is_another_plan() -> None:
    plan = example()
    other = random_site(random_weight(12, 8, seed=1), name="a.weight")
    for choice in (
        dataclasses.replace(plan.choices[0], ranks=(("r", 4),)),
        dataclasses.replace(plan.choices[0], site=other),
    ):
        assert dataclasses.replace(plan, choices=(choice, plan.choices[1])) != plan


def test_costs_are_sums_over_the_sites() -> None:
    assert example().cost == Cost(132, 528, 132.0)
    assert example().dense_cost == Cost(168, 672, 168.0)


def test_a_file_of_a_person_needs_only_site_decomposition_and_ranks() -> None:
    row = {"site": example().choices[0].site.to_dict(), "decomposition": "svd", "ranks": {"r": 3}}
    plan = Plan.from_json(json.dumps({"format": "tdc-plan", "version": 1, "sites": [row]}))
    assert plan.choices[0] == example().choices[0]


@pytest.mark.parametrize("text", ["", "null", "3", '{"format": "tdc-plan", "version": 1}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"plan"):
        Plan.from_json(text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_the_table_of_a_plan(golden: Callable[[str], None]) -> None:
    """Weights of singular values 1, 1/2, 1/3, ...: the errors are exact to many more digits than are printed."""
    golden(str(tdc.plan(random_mlp(), random_mlp()[0].weight[:4], budget="params=0.5", progress=False)))


def test_the_text_of_a_plan_file(golden: Callable[[str], None]) -> None:
    site = Site(OpKind.LINEAR, (("o", 12), ("i", 8)), "float32", 0, (0.5, -1.25), ("a.weight", "b.weight"), 2)
    choice = Candidate(site, "svd", "", (("r", 3),), 0.125, 2.0, Cost(60, 240, 120.0), Cost(96, 384, 192.0))
    remarks = (Remark("c.weight", "choose-plan", "too precious"), Remark("", "calibrate", "few rows"))
    golden(Plan((choice,), "input", "abc", "cpu", "params=0.8", remarks=remarks).to_json())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"r": 3', '"r": 1.5'),
        ('"r": 3', '"r": true'),
        ('"r": 3', '"r": Infinity'),
        ('"error": 0.125', '"error": NaN'),
        ('"error": 0.125', '"error": 1e999'),
        ('"metric": "weight"', '"metric": "wieght"'),
        ('"uses": 1', '"uses": 1e999'),
    ],
)
def test_a_wrong_value_is_refused(old: str, new: str) -> None:
    text = example().to_json()
    assert old in text
    with pytest.raises(PlanError):
        Plan.from_json(text.replace(old, new))
