"""``torch.compile(model, backend="tdc")``: how it is found, what it takes, and what it gives."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import _parts, _settings
from tdc._compiled import Graph
from tdc.ir import Candidate, Plan
from tdc.testing import random_mlp
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
ROOT = Path(__file__).parents[2]
X = torch.linspace(-1, 1, 6 * 24).reshape(6, 24).sin()
HALF = {"budget": "params=0.6", "inner": "eager", "strict": True}


def compiled(model: Any, options: dict[str, Any], **more: Any) -> Any:
    return torch.compile(model, backend=tdc_backend, options=options, **more)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def moved(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def run(code: str, path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_backend_is_found_by_its_name_without_importing_tdc(tmp_path: Path) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = project["entry-points"]["torch_dynamo_backends"]
    folder = tmp_path / "found-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: found\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\ntdc = {group['tdc']}\n")
    code = """
import sys, torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 16)
    def forward(self, x):
        return self.b(self.a(x).relu())
m, x = Net(), torch.randn(5, 24)
options = {"budget": "params=0.6", "inner": "eager", "strict": True}
before = "tdc" in sys.modules
fast = torch.compile(m, backend="tdc", options=options)
again = torch.compile(m, backend="tdc", options=options)
with torch.no_grad():
    y = fast(x)
import tdc
print(before, "tdc" in torch._dynamo.list_backends(), tdc.report(fast).replaced, bool((y - m(x)).abs().max() > 0))
m.compile(backend="tdc", options=options)
with torch.no_grad():
    print(bool(torch.equal(m(x), y)))
"""
    assert run(code, tmp_path).split() == ["False", "True", "2", "True", "True"]


def test_import_tdc_does_not_import_dynamo(tmp_path: Path) -> None:
    assert run("import sys, tdc; print('torch._dynamo' in sys.modules)", tmp_path).strip() == "False"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": "params=0.5"}, "unknown option 'bugdet' of the backend 'tdc'. Did you mean 'budget'?"),
        ({"inplace": True}, "inplace is no option of the backend: torch.compile leaves the module as it is"),
        ({"budget": "params=0.5", "plan": Plan()}, "one of the two"),
        ({"budget": "parms=0.5"}, "params"),
        ({"budget": "params=0.5", "inner": "indcutor"}, "unknown inner 'indcutor'. Known: inductor, aot_eager, eager"),
        ({"budget": "params=0.5", "calibrate_calls": -1}, "calibrate_calls must be a whole number"),
        ({"budget": "params=0.5", "strict": "yes"}, "strict must be True or False"),
        ({"budget": "params=0.5", "training": "factors"}, "what the module door does: tdc.compress"),
        ({"budget": "params=0.5", "metric": "input"}, "needs statistics=, calibration= or calibrate_calls="),
        ({"budget": "params=0.5", "calibration": [X], "calibrate_calls": 3}, "one of the three"),
        ({"budget": "params=0.5", "statistics": 3}, "statistics= takes what tdc.calibrate returns"),
        ({"plan": "/nowhere/plan.json"}, "/nowhere/plan.json cannot be read"),
        ({"plan": Plan(metric="input")}, "needs statistics=, calibration= or calibrate_calls="),
    ],
)
def test_wrong_options_are_refused_with_advice(options: dict[str, Any], message: str) -> None:
    fast = compiled(random_mlp(), options)
    with torch.no_grad(), pytest.raises(Exception, match=re.escape(message)):
        fast(X)


def test_without_options_something_useful_is_done_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_settings, "_said", [])
    models = [random_mlp().eval() for _ in range(2)]
    fast = [torch.compile(model, backend=tdc_backend, options={"inner": "eager"}) for model in models]
    with torch.no_grad(), caplog.at_level(logging.WARNING, "tdc"):
        for _ in range(8):
            answers = [f(X) for f in fast]
        for f in fast:
            tdc.wait(f, timeout=60)
        assert all(torch.equal(a, m(X)) for a, m in zip(answers, models, strict=True))
        assert not any(torch.equal(f(X), m(X)) for f, m in zip(fast, models, strict=True))
    said = [r.getMessage() for r in caplog.records if "no budget and no plan" in r.getMessage()]
    assert len(said) == 1
    assert "0.7 of their parameters, with the statistics of the first 8 calls, which run dense" in said[0]
    assert tdc.report(fast[0]).budget == "params=0.7"


def test_the_result_is_that_of_the_module_door() -> None:
    model = random_mlp().eval()
    small = tdc.compress(model, X, budget="params=0.6", progress=False)
    fast = compiled(model, HALF)
    with torch.no_grad():
        assert torch.equal(fast(X), small(X))
        assert moved(fast(X), model(X)) > 1e-4
    ours, theirs = tdc.report(fast), tdc.report(small)
    assert [(s.name, s.ranks, s.error) for s in ours.sites] == [(s.name, s.ranks, s.error) for s in theirs.sites]
    assert (ours.door, ours.replaced, ours.model_before.params) == ("fx", 2, theirs.model_before.params)
    assert ours.model_after.params == theirs.model_after.params


def test_the_graph_that_dynamo_gave_is_left_alone() -> None:
    seen: list[bool] = []

    def watching(gm: Any, example_inputs: Any, **options: Any) -> Any:
        before = (len(gm.graph.nodes), str(gm.graph), len(example_inputs))
        made = tdc_backend(gm, example_inputs, **options)
        seen.append(before == (len(gm.graph.nodes), str(gm.graph), len(example_inputs)))
        return made

    fast = torch.compile(random_mlp(), backend=watching, options=HALF)
    with torch.no_grad():
        fast(X)
    assert seen == [True]


def test_a_plan_that_is_dense_everywhere_gives_the_inner_compilers_own_callable() -> None:
    made: list[Any] = []

    def watching(gm: Any, example_inputs: Any, **options: Any) -> Any:
        made.append((tdc_backend(gm, example_inputs, **options), gm))
        return made[-1][0]

    model = random_mlp()
    plan = tdc.plan(model, X, budget="params=0.6", progress=False)
    dense = Plan(tuple(Candidate(choice.site, "dense") for choice in plan.choices))
    with torch.no_grad():
        torch.compile(model, backend=watching, options={"plan": dense, "inner": "eager"})(X)
        assert made[0][0].__self__ is made[0][1]
        torch.compile(random_mlp(), backend=watching, options=HALF)(X)
    assert isinstance(made[1][0], Graph)


def test_a_plan_for_other_weights_leaves_the_model_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plan = tdc.plan(random_mlp(), X, budget="params=0.6", progress=False)
    other = random_mlp()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "tdc"):
        other[0].weight.copy_(torch.randn(40, 24))
        other[2].weight.copy_(torch.randn(16, 40))
        assert torch.equal(compiled(other, {"plan": plan, "inner": "eager"})(X), other(X))
        assert "the plan has none of the 2 site(s) of this graph" in caplog.text
        with pytest.raises(Exception, match="the plan has none"):
            compiled(other, {"plan": plan, "inner": "eager", "strict": True})(X)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_inner_compiler_gives_the_same_for_all_sizes(inner: str) -> None:
    model = random_mlp().eval()
    small = tdc.compress(model, X, budget="params=0.6", progress=False)
    fast = compiled(model, {**HALF, "inner": inner})
    with torch.no_grad():
        for batch in (6, 3, 5, 1, 17):
            x = torch.randn(batch, 24)
            assert_equal(fast(x), small(x))
    assert len(_parts.parts()) == 1, "recompilations share the factors"


@pytest.mark.slow
@pytest.mark.parametrize("freezing", ["auto", "on", "off"])
def test_inductor_with_and_without_freezing(freezing: str, full: dict[str, Any]) -> None:
    model = random_mlp().eval()
    fast = compiled(model, {**full, "inner": "inductor", "freezing": freezing})
    with torch.no_grad():
        assert_equal(fast(X), model(X))
        model[0].bias.add_(1)
        model[2].weight.mul_(2)
        assert_equal(fast(X), model(X))


@pytest.mark.parametrize("how", ["marked", "dynamic"])
def test_dynamic_sizes(how: str, full: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body = nn.LayerNorm(24, eps=1e-3), random_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.norm(x)) * x.shape[1]

    model = Net().eval()
    fast = compiled(model, full, dynamic=True if how == "dynamic" else None)
    with torch.no_grad():
        for rows, steps in ((2, 7), (3, 9), (5, 4)):
            x = torch.randn(rows, steps, 24)
            if how == "marked":
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 1)
            assert_equal(fast(x), model(x))
    assert tdc.report(fast).replaced == 2
