"""Sites that read the same input and are decomposed together: one plan, and one computation of what they share, in all
doors.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import Factored
from tdc.statistics import divergence

WIDTH = 48
NARROW = 24


class Attention(nn.Module):
    """Query, key and value of unequal heights, whose rows lie near one subspace, as those of trained models do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, o) for o in (WIDTH, NARROW, NARROW))
        self.out = nn.Linear(WIDTH, WIDTH)
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(14, WIDTH, generator=generator) / WIDTH**0.5
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                mix = torch.randn(layer.out_features, 14, generator=generator) / 14**0.5
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(0.5 * mix @ base * 14**0.5 + 0.005 * noise)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        key, value = torch.cat([key, key], -1), torch.cat([value, value], -1)
        return x + self.out(torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5, -1) @ value)


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Attention(1), Attention(2)).eval()


def batches(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2, 0.3, WIDTH)
    return [torch.randn(8, 12, WIDTH, generator=generator) * scale for _ in range(count)]


TRAIN, TEST = batches(12, 5), batches(1, 6)[0]


class Case:
    def __init__(self) -> None:
        self.dense = model()
        self.statistics = tdc.calibrate(self.dense, TRAIN, progress=False)
        self.plan = tdc.plan(self.dense, TEST, budget="params=0.45", statistics=self.statistics, progress=False)
        self.small = self.cut()

    def cut(self, **options: Any) -> nn.Module:
        options = {"plan": self.plan, **options}
        return tdc.compress(self.dense, TEST, statistics=self.statistics, progress=False, **options)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def groups(plan: tdc.Plan) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for choice in plan.choices:
        if choice.joint:
            found.setdefault(choice.joint.group, []).append(choice)
    return found


def lost(case: Case, small: nn.Module) -> float:
    with torch.no_grad():
        return divergence({"y": case.dense(TEST)}, {"y": small(TEST)})


def apart(a: Tensor, b: Tensor) -> float:
    """The greatest difference, as a fraction of the greatest entry: rounding in float32."""
    with torch.no_grad():
        return float((a - b).abs().max() / b.abs().max())


def test_query_key_and_value_are_decided_together(case: Case) -> None:
    found = groups(case.plan)
    names = [[choice.site.name for choice in members] for members in found.values()]
    assert names == [[f"{k}.{layer}.weight" for layer in ("query", "key", "value")] for k in range(2)]
    for members in found.values():
        assert {choice.joint.outputs for choice in members} == {WIDTH + 2 * NARROW}
        assert len({choice.ranks for choice in members}) == 1
    assert "(joint 1)" in str(case.plan)
    assert "(joint 2)" in str(tdc.report(case.small))


def test_it_loses_less_than_the_best_plan_without_groups(case: Case) -> None:
    alone = tdc.plan(case.dense, TEST, budget="params=0.45", statistics=_apart(case.statistics), progress=False)
    assert not groups(alone)
    assert case.plan.loss < 0.8 * alone.loss
    assert lost(case, case.small) < lost(case, case.cut(plan=alone))
    assert case.plan.bound is not None
    assert case.plan.bound <= case.plan.loss


def _apart(statistics: tdc.Statistics) -> tdc.Statistics:
    """The same statistics as if every site had read an input of its own."""
    from dataclasses import replace

    moments, means, entries = list(statistics.moments), list(statistics.means), []
    for entry in statistics.sites:
        moments.append(statistics.moments[entry.moment])
        means.append(statistics.means[entry.moment])
        entries.append(replace(entry, moment=len(moments) - 1))
    return replace(statistics, sites=tuple(entries), moments=tuple(moments), means=tuple(means))


def test_what_is_shared_is_stored_and_counted_once(case: Case) -> None:
    report = tdc.report(case.small)
    weights = sum(p.numel() for name, p in case.small.named_parameters() if ".weight" in name)
    assert weights == report.after.params == case.plan.cost.params
    before, after = report.model_before, report.model_after
    assert before.params - after.params == report.before.params - report.after.params
    assert len({t.data_ptr() for t in case.small.state_dict().values()}) == len(case.small.state_dict())
    first, second = case.small[0].query, case.small[0].key
    assert second.factors["coef"] is first.weight_coef
    assert "weight_coef" not in dict(second.named_parameters())


def test_it_is_computed_once(case: Case) -> None:
    report = tdc.report(case.small)
    saved = report.before.macs - report.after.macs
    assert report.model_before.macs - report.model_after.macs == pytest.approx(saved, rel=1e-6)


def test_plans_hold_the_groups(case: Case, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(case.plan.to_json())
    again = tdc.Plan.load(tmp_path / "plan.json")
    assert again == case.plan
    assert [c.joint for c in again.choices] == [c.joint for c in case.plan.choices]
    assert torch.equal(case.cut(plan=again)(TEST), case.small(TEST))


def test_saved_copied_and_pickled_models_share_too(case: Case, tmp_path: Path) -> None:
    tdc.save(case.small, tmp_path / "small.tdc")
    loaded = tdc.load(tmp_path / "small.tdc", model())
    copied = copy.deepcopy(case.small)
    pickled = pickle.loads(pickle.dumps(case.small))
    for other in (loaded, copied, pickled):
        assert torch.equal(other(TEST), case.small(TEST))
        assert other[0].key.factors["coef"] is other[0].query.weight_coef
        assert other[0].query.weight_coef is not case.small[0].query.weight_coef
    dense = tdc.densify(case.small)
    assert apart(dense(TEST), case.small(TEST)) < 1e-5


def test_gradients_are_those_of_layers_that_compute_it_each_by_themselves(case: Case) -> None:
    small, alone = copy.deepcopy(case.small), copy.deepcopy(case.small)
    for module in alone.modules():
        if isinstance(module, Factored) and module.__dict__["_sharing"] is not None:
            module.__dict__["_sharing"].count = 1  # nothing is kept
    results = []
    for each in (small, alone):
        each(TEST).square().sum().backward()
        results.append({name: p.grad for name, p in each.named_parameters() if "weight_" in name})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert apart(gradient, results[1][name]) < 1e-4, name


def test_what_was_computed_is_taken_only_for_the_same_input_factors_and_mode(case: Case) -> None:
    block = copy.deepcopy(case.small)[0]
    x, expected = TEST.clone(), block.key(TEST.clone()).detach()
    block.query(x)
    x.mul_(2)
    assert not torch.allclose(block.key(x), expected)  # written to in between
    block.query(x := TEST.clone())
    assert torch.equal(block.key(TEST.clone()), expected)  # another tensor
    block.query(x)
    with torch.no_grad():
        block.query.weight_coef.mul_(1.5)
    assert not torch.allclose(block.value(x), case.small[0].value(x))
    with torch.no_grad():
        block.query(x)
    assert block.key(x).requires_grad


def test_shapes_are_known_on_the_meta_device(case: Case) -> None:
    assert copy.deepcopy(case.small).to("meta")(TEST.to("meta")).shape == TEST.shape


def test_autocast_counts_as_another_mode(case: Case) -> None:
    block = copy.deepcopy(case.small)[0]
    with torch.no_grad():
        block.query(TEST)
        with torch.autocast("cpu", torch.bfloat16):
            assert block.key(TEST).dtype == torch.bfloat16
        assert block.value(TEST).dtype == torch.float32


def test_nothing_is_kept_when_all_have_had_it(case: Case) -> None:
    small = copy.deepcopy(case.small)
    small(TEST)
    assert small[0].query.__dict__["_sharing"]._kept is None


def test_an_export_computes_it_once(case: Case) -> None:
    exported = torch.export.export(case.dense, (TEST,))
    result = tdc.compress_export(exported, plan=case.plan, statistics=case.statistics)
    assert apart(result.module()(TEST), case.small(TEST)) < 1e-5
    coefficients = [name for name in result.state_dict if name.endswith("coef")]
    assert not [name for name in coefficients if "key" in name or "value" in name]
    products = [n for n in result.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(products) == 2 * (1 + 3 + 2)


def test_onnx_plans_the_same_and_computes_it_once(case: Case, tmp_path: Path) -> None:
    source, result = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    torch.onnx.export(case.dense, (TEST,), source, dynamo=True, verbose=False)
    options = {"budget": "params=0.45", "statistics": case.statistics, "progress": False}
    assert tdc.plan(source, **options) == case.plan
    tdc.compress_onnx(source, result, plan=case.plan, statistics=case.statistics, progress=False)
    session = onnxruntime.InferenceSession(result)
    (given,) = session.run(None, {session.get_inputs()[0].name: TEST.numpy()})
    assert apart(torch.from_numpy(given), case.small(TEST)) < 1e-5
    graph = onnx.load(result).graph
    assert sum(node.op_type == "MatMul" for node in graph.node) == 2 * (1 + 3 + 2 + 2)
    names = [tensor.name for tensor in graph.initializer]
    assert sum("coef" in name for name in names) == 4
    produced = {output for node in graph.node for output in node.output}
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert produced <= read


def test_a_transposed_gemm_shares_its_transpose(case: Case, tmp_path: Path) -> None:
    flat = nn.Sequential(Attention(1)).eval()
    twice = _Two(flat[0].query, flat[0].key).eval()
    data = [batch.flatten(0, 1) for batch in TRAIN]
    path = tmp_path / "two.onnx"
    torch.onnx.export(twice, (data[0],), path, dynamo=True, verbose=False)
    named = [{"x": batch.numpy()} for batch in data]
    plan = tdc.plan(path, budget="params=0.5", calibration=named, progress=False)
    assert groups(plan)
    tdc.compress_onnx(path, tmp_path / "out.onnx", plan=plan, calibration=named, progress=False)
    runs = [onnxruntime.InferenceSession(p).run(None, {"x": data[1].numpy()}) for p in (path, tmp_path / "out.onnx")]
    for old, new in zip(*runs, strict=True):
        assert np.linalg.norm(old - new) < 0.2 * np.linalg.norm(old)


class _Two(nn.Module):
    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_torch_compile_gives_the_same(case: Case) -> None:
    compiled = torch.compile(
        case.dense, backend="tdc", options={"plan": case.plan, "statistics": case.statistics, "inner": "eager"}
    )
    with torch.no_grad():
        assert apart(compiled(TEST), case.small(TEST)) < 1e-5
    whole = torch.compile(case.small, backend="eager", fullgraph=True)
    assert apart(whole(TEST), case.small(TEST)) < 1e-5


def test_a_model_without_one_of_the_sites_fits_the_others_by_themselves(case: Case) -> None:
    part = tdc.compress(
        case.dense,
        TEST,
        plan=_without(case.plan, "0.key.weight"),
        statistics=case.statistics,
        progress=False,
    )
    report = tdc.report(part)
    alone = [r.site for r in report.remarks if "fitted by itself" in r.reason]
    assert alone == ["0.query.weight", "0.value.weight"]
    assert lost(case, part) < 3 * lost(case, case.small)
    assert part[0].query.__dict__["_sharing"] is None


def _without(plan: tdc.Plan, name: str) -> tdc.Plan:
    from dataclasses import replace

    return replace(plan, choices=tuple(c for c in plan.choices if c.site.name != name))


def test_a_site_that_stays_dense_takes_its_group_with_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdc.passes import fit_factors

    real = fit_factors._stored

    def overflowing(unit: Any, choices: Any, weights: Any, metrics: Any) -> Any:
        fits = real(unit, choices, weights, metrics)
        return [
            ({}, w) if c.site.name == "0.query.weight" else f for c, w, f in zip(choices, weights, fits, strict=True)
        ]

    monkeypatch.setattr(fit_factors, "_stored", overflowing)
    report = tdc.report(case.cut())
    dense = [site.name for site in report.sites if site.decomposition == "dense"]
    assert dense == ["0.query.weight", "0.key.weight", "0.value.weight"]
    told = [r.site for r in report.remarks if r.reason == "shares factors with 0.query.weight: stays dense with it"]
    assert told == dense[1:]


def test_anchored_and_healed_models_keep_the_group(case: Case) -> None:
    small = case.cut(calibration=TRAIN, heal=tdc.Heal(epochs=2, patience=2))
    assert small[0].key.factors["coef"] is small[0].query.weight_coef
    assert lost(case, small) < 1.1 * lost(case, case.small)
