"""Ranks without a budget, in every door: those that the singular values of each weight suggest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.__main__ import main
from tdc.errors import BudgetError, OptionError, TdcError
from tdc.ir import Plan
from tdc.testing import random_mlp
from tdc.torch_backend import tdc_backend

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(2, 24, 9, 9, generator=torch.Generator().manual_seed(3))
SUGGESTING = ("evbmf", "energy", "energy=0.8")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rows: int, columns: int, rank: int, noise: float = 0.1) -> Tensor:
    """A matrix of that rank with entries near 1, and noise."""
    product = normal(rows, rank, seed=1) @ normal(rank, columns, seed=2) / rank**0.5
    return product + noise * normal(rows, columns, seed=3)


@pytest.fixture
def mlp() -> nn.Sequential:
    """Two layers whose weights have the ranks 9 and 6 under noise."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 48)).eval()
    with torch.no_grad():
        model[0].weight.copy_(planted(96, 64, 9))
        model[2].weight.copy_(planted(48, 96, 6))
    return model


@pytest.fixture
def cnn() -> nn.Sequential:
    """A convolution that has 7 of 24 input and 5 of 32 output channels, under noise."""
    core = normal(5, 7, 3, 3, seed=4) / 35**0.5
    weight = torch.einsum("os,srpq,ri->oipq", normal(32, 5, seed=5), core, normal(7, 24, seed=6))
    model = nn.Sequential(nn.Conv2d(24, 32, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(weight + 0.05 * normal(32, 24, 3, 3, seed=7))
    return model


def ranks(made: Plan | tdc.Report) -> list[dict[str, int]]:
    return [dict(each.ranks) for each in (made.sites if isinstance(made, tdc.Report) else made.choices)]


def reasons(made: Plan | tdc.Report) -> str:
    return "\n".join(remark.reason for remark in made.remarks)


def exported(model: nn.Module, folder: Path) -> Path:
    torch.onnx.export(model, (X,), folder / "model.onnx", verbose=False)
    return folder / "model.onnx"


# ---- what is chosen


def test_evbmf_finds_the_planted_ranks_of_linear_layers(mlp: nn.Sequential) -> None:
    plan = tdc.plan(mlp, X, allocation="evbmf", allow="svd", progress=False)
    assert ranks(plan) == [{"r": 9}, {"r": 6}]
    assert (plan.allocation, plan.budget, plan.bound, plan.price) == ("evbmf", "", None, ())
    free = tdc.plan(mlp, X, allocation="evbmf", progress=False)
    assert ranks(free) == ranks(plan)
    assert {choice.decomposition for choice in free.choices} == {"pivoted"}, "as accurate, and fewer numbers"
    assert free.cost.params < plan.cost.params


def test_evbmf_finds_the_planted_ranks_of_a_convolution(cnn: nn.Sequential) -> None:
    small = tdc.compress(cnn, IMAGES, allocation="evbmf", allow="tucker2", progress=False)
    assert ranks(tdc.report(small)) == [{"s": 5, "r": 7}]
    with torch.no_grad():
        lost = (small(IMAGES) - cnn(IMAGES)).square().mean() / cnn(IMAGES).square().mean()
    assert 0 < lost < 0.02
    assert ranks(tdc.plan(cnn, IMAGES, allocation="evbmf", allow="output_svd", progress=False)) == [{"r": 5}]
    assert ranks(tdc.plan(cnn, IMAGES, allocation="evbmf", allow="input_svd", progress=False)) == [{"r": 7}]


def test_energy_keeps_the_share_of_the_squared_norm_and_one_rank_less_does_not(mlp: nn.Sequential) -> None:
    for share in (0.5, 0.8, 0.95):
        plan = tdc.plan(mlp, X, allocation=f"energy={share}", allow="svd", progress=False)
        for choice, layer in zip(plan.choices, (mlp[0], mlp[2]), strict=True):
            squares = torch.linalg.svdvals(layer.weight.detach().double()).square()
            rank = dict(choice.ranks)["r"]
            assert squares[:rank].sum() >= share * squares.sum() > squares[: rank - 1].sum()
            assert choice.error == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-4)
    assert tdc.plan(mlp, X, allocation="energy", progress=False) == tdc.plan(
        mlp, X, allocation="energy=0.95", progress=False
    )


def test_the_ranks_are_those_of_the_weight_whatever_the_metric(mlp: nn.Sequential) -> None:
    data = [normal(256, 64, seed=8) * torch.linspace(3, 0.01, 64)]
    plain = tdc.plan(mlp, X, allocation="energy=0.7", allow="svd", progress=False)
    for metric in ("input", "fisher"):
        plan = tdc.plan(mlp, X, allocation="energy=0.7", allow="svd", metric=metric, calibration=data, progress=False)
        assert ranks(plan) == ranks(plain)
        assert plan.metric == metric
        assert [c.error for c in plan.choices] != [c.error for c in plain.choices]


def test_a_format_that_finds_little_in_a_weight_loses_to_one_that_finds_more(mlp: nn.Sequential) -> None:
    """A Kronecker product of these weights has hardly any numbers, and hardly anything of them."""
    alone = tdc.plan(mlp, X, allocation="energy=0.05", allow="kronecker", progress=False)
    plan = tdc.plan(mlp, X, allocation="evbmf", allow=("kronecker", "svd"), progress=False)
    assert alone.cost.params < plan.cost.params
    assert {choice.decomposition for choice in plan.choices} == {"svd"}


# ---- what stays dense


def test_formats_with_ranks_of_no_matrix_are_declined_with_the_reason(cnn: nn.Sequential) -> None:
    plan = tdc.plan(cnn, IMAGES, allocation="evbmf", allow=("cp", "tucker2"), progress=False)
    assert [choice.decomposition for choice in plan.choices] == ["tucker2"]
    assert "cp is left out: its rank r belongs to 3 factors (a, c, b): it is the rank of no matrix" in reasons(plan)
    small = tdc.compress(cnn, IMAGES, allocation="energy", allow="cp", progress=False)
    assert tdc.report(small).replaced == 0
    assert "cp has no energy=0.95 rank that stores less than dense" in reasons(tdc.report(small))
    with torch.no_grad():
        assert torch.equal(small(IMAGES), cnn(IMAGES))


def test_a_layer_whose_ranks_save_nothing_stays_dense_with_the_numbers(mlp: nn.Sequential) -> None:
    with torch.no_grad():
        mlp[2].weight.copy_(torch.eye(48, 96) + 0.1 * normal(48, 96, seed=9))
    plan = tdc.plan(mlp, X, allocation="energy=0.99", allow="svd", progress=False)
    assert plan.choices[1].is_dense
    (reason,) = [r.reason for r in plan.remarks if r.site == "2.weight" and "left out" in r.reason]
    rank = int(reason.partition("at r=")[2].partition(" ")[0])
    assert reason == (
        f"linear 48x96: svd is left out: at r={rank} it takes {rank * 144 / (48 * 96):.3g} of the params of dense"
    )
    quiet = tdc.plan(mlp, X, allocation="energy=0.99", progress=False)
    left = [r.site for r in quiet.remarks if "left out" in r.reason]
    assert set(left) <= {c.site.name for c in quiet.choices if c.is_dense}, "said of layers that stay dense alone"


def test_a_layer_of_noise_stays_dense(mlp: nn.Sequential) -> None:
    with torch.no_grad():
        mlp[0].weight.copy_(normal(96, 64, seed=10))
    plan = tdc.plan(mlp, X, allocation="evbmf", progress=False)
    assert [choice.is_dense for choice in plan.choices] == [True, False]
    assert "svd is left out: evbmf finds no rank r: the weight as (o) x (i) is all noise" in reasons(plan)


# ---- doors and files


@pytest.mark.parametrize("allocation", SUGGESTING)
def test_all_doors_decide_the_same(mlp: nn.Sequential, tmp_path: Path, allocation: str) -> None:
    plan = tdc.plan(mlp, X, allocation=allocation, progress=False)
    expected = [(c.decomposition, c.variant, dict(c.ranks)) for c in plan.choices]
    source, out = exported(mlp, tmp_path), tmp_path / "small.onnx"
    assert tdc.plan(source, allocation=allocation, progress=False) == plan
    small = tdc.compress(mlp, X, allocation=allocation, progress=False)
    program = tdc.compress_export(torch.export.export(mlp, (X,)), allocation=allocation, progress=False)
    fast: Any = torch.compile(
        copy.deepcopy(mlp),
        backend=tdc_backend,
        options={"allocation": allocation, "inner": "eager", "strict": True},  # type: ignore[dict-item]
    )
    with torch.no_grad():
        assert torch.equal(fast(X), small(X))
        assert torch.allclose(program.module()(X), small(X), atol=1e-4)
    file = tdc.compress_onnx(source, out, allocation=allocation, progress=False)
    for report in (tdc.report(small), tdc.report(program), tdc.report(fast), file, tdc.report(out)):
        assert [(s.decomposition, s.variant, dict(s.ranks)) for s in report.sites] == expected
        assert report.budget == ""
        assert f"no budget: each weight has the ranks that {plan.allocation} suggests" in str(report)


def test_a_compiled_model_is_fitted_again_at_the_same_ranks(mlp: nn.Sequential) -> None:
    options: Any = {"allocation": "evbmf", "inner": "eager", "strict": True}
    fast: Any = torch.compile(mlp, backend=tdc_backend, options=options)
    with torch.no_grad():
        before = fast(X)
        mlp[2].weight.mul_(2)
        mlp[2].bias.mul_(2)
        assert torch.allclose(fast(X), 2 * before, atol=1e-3)


def test_the_plan_prints_explains_and_survives_its_file(mlp: nn.Sequential, tmp_path: Path) -> None:
    plan = tdc.plan(mlp, X, allocation="energy=0.9", progress=False)
    assert str(plan).startswith("plan for no budget, metric weight, target cpu, energy=0.9 allocation\n")
    told = plan.explain()
    assert told.startswith("[choose-plan] no budget: each weight has the ranks that energy=0.9 suggests")
    assert told.count("\n* ") == 2
    assert "price, what the budget saves" not in told
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.allocation == "energy=0.9"
    applied = tdc.compress(mlp, X, plan=tmp_path / "plan.json", progress=False)
    small = tdc.compress(mlp, X, allocation="energy=0.9", progress=False)
    with torch.no_grad():
        assert torch.equal(applied(X), small(X))
    tdc.save(small, tmp_path / "small.tdc")
    loaded = tdc.load(tmp_path / "small.tdc", copy.deepcopy(mlp))
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))
    assert tdc.report(loaded).budget == tdc.report(tmp_path / "small.tdc").budget == ""
    assert "budget -, metric weight" in str(tdc.report(loaded))


def test_the_command_compresses_and_plans(
    mlp: nn.Sequential, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plan, out = str(exported(mlp, tmp_path)), str(tmp_path / "plan.json"), tmp_path / "small.onnx"
    assert main(["plan", source, "--allocation", "energy=0.9", "--explain", "-o", plan, "--quiet"]) == 0
    assert "ranks that energy=0.9 suggests" in capsys.readouterr().out
    assert Plan.load(plan) == tdc.plan(mlp, X, allocation="energy=0.9", progress=False)
    assert main(["compress", source, str(out), "--allocation", "evbmf", "--allow", "svd", "--quiet"]) == 0
    assert "2 of 2 candidate sites replaced (budget -, metric weight" in capsys.readouterr().out
    assert ranks(tdc.report(out)) == [{"r": 9}, {"r": 6}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "--allocation", "evbmf", "--budget", "params=0.5"], "the allocation evbmf takes no budget"),
        (["compress", "--allocation", "evbmf", "--plan", "plan.json"], "the plan has its ranks already"),
        (["compress", "--allocation", "energy=1.5"], "needs a share of the squared norm above 0 and at most 1"),
        (["compress"], "give budget= (for example budget='params=0.5') or plan=, one of the two; or"),
        (["plan", "--allocation", "energy", "--budget", "params=0.5"], "the allocation energy=0.95 takes no budget"),
        (["plan", "--allocation", "evbmf", "--pareto"], "the allocation evbmf takes no budget"),
        (["plan"], "give budget= (for example budget='params=0.5'), or allocation='evbmf' or 'energy'"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(exported(random_mlp((64, 96, 48)), tmp_path))
    before = sorted(tmp_path.iterdir())
    name, *rest = arguments
    files = [source, *([str(tmp_path / "small.onnx")] if name == "compress" else [])]
    assert main([name, *files, *rest, "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


# ---- refusals


def doors(model: nn.Module, folder: Path) -> Mapping[str, Callable[..., object]]:
    source = exported(model, folder)
    program = torch.export.export(model, (X,))
    return {
        "plan": lambda **given: tdc.plan(model, X, **given),
        "compress": lambda **given: tdc.compress(model, X, **given),
        "onnx": lambda **given: tdc.compress_onnx(source, folder / "small.onnx", **given),
        "export": lambda **given: tdc.compress_export(program, **given),
    }


def refused(call: Callable[..., object], error: type[TdcError], words: str, **options: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        call(**options, progress=False)
    assert type(caught.value) is error


def test_a_budget_beside_is_refused_in_every_door(mlp: nn.Sequential, tmp_path: Path) -> None:
    calls = doors(mlp, tmp_path)
    for name, call in calls.items():
        for budget in ("params=0.5", "loss=0.01", {"macs": 0.5}):
            refused(call, BudgetError, "the allocation evbmf takes no budget", allocation="evbmf", budget=budget)
        lacking = BudgetError if name == "plan" else OptionError
        refused(call, lacking, "or allocation='evbmf'|or, in place of both", allocation="uniform")
    for name in ("compress", "onnx", "export"):
        given = {"evaluate": lambda model: 1.0, "metric_drop": 0.1}
        refused(calls[name], OptionError, "it cannot go with the allocation evbmf", allocation="evbmf", **given)
        refused(calls[name], OptionError, "the plan has its ranks already", allocation="evbmf", plan=Plan())
    with pytest.raises(BudgetError, match=r"energy=0\.95 takes no budget"):
        tdc.pareto(mlp, X, allocation="energy", progress=False)
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocation": "evbmf", "budget": "params=0.5"}, "the allocation evbmf takes no budget"),
        ({"allocation": "evbmf", "plan": Plan()}, "the plan has its ranks already"),
        ({"allocation": "energy=much"}, "'much' in the allocation 'energy=much' is not a number"),
    ],
)
def test_the_backend_refuses_the_same(dynamo: None, options: dict[str, Any], words: str) -> None:
    fast: Any = torch.compile(random_mlp((64, 48)), backend=tdc_backend, options=options)
    with torch.no_grad(), pytest.raises(Exception, match=words):
        fast(X)
