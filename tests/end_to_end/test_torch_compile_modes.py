"""``torch.compile(model, backend="tdc")``: gradients, modes, profile-guided planning, memory."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import _parts
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


class Broken(nn.Module):
    """A graph break in the middle, with one weight on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        torch._dynamo.graph_break()
        return self.a(x)


def test_where_gradients_are_wanted_the_model_is_dense_and_says_so_once() -> None:
    model = random_mlp()
    fast = compiled(model, HALF)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in (X, X[:3]):
            fast(x).sum().backward()
            expected = copy.deepcopy(model)
            expected.zero_grad()
    found = [parameter.grad for parameter in model.parameters()]
    for x in (X, X[:3]):
        expected(x).sum().backward()
    for ours, theirs in zip(found, expected.parameters(), strict=True):
        assert_equal(ours, theirs.grad)
    assert sum("gradients are wanted" in str(w.message) for w in caught) == 1
    with torch.no_grad():
        assert moved(fast(X), model(X)) > 1e-4
    torch._dynamo.reset()
    with pytest.raises(Exception, match="gradients are wanted"):
        compiled(model, {**HALF, "training": "error"})(X)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inference_mode_and_tensors_made_in_it(inner: str, full: dict[str, Any]) -> None:
    with torch.inference_mode():
        model = random_mlp().eval()
        fast = compiled(model, {**full, "inner": inner})
        assert_equal(fast(X), model(X))
        assert_equal(fast(X.clone()), model(X))
    outside = random_mlp().eval()
    other = compiled(outside, {**full, "inner": inner})
    with torch.inference_mode():
        assert_equal(other(X), outside(X))
    with torch.no_grad():
        assert_equal(other(X), outside(X))


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_around_and_inside(calls: int, inner: str, full: dict[str, Any]) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = random_mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x).float()

    around, inside = random_mlp().eval(), Inside().eval()
    options = {**full, "inner": inner, "calibrate_calls": calls}
    with torch.no_grad():
        for model, mode in ((around, True), (inside, False)):
            exact, fast = copy.deepcopy(model).float()(X) if mode else model.body(X), compiled(model, options)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode):
                dense = model(X)
                for _ in range(calls):
                    fast(X)
                if calls:
                    tdc.wait(fast, timeout=60)
                found = fast(X)
            assert found.dtype == dense.dtype
            assert moved(found.float(), exact) < 3 * moved(dense.float(), exact) + 1e-3


def test_bfloat16_weights(full: dict[str, Any]) -> None:
    model = random_mlp().eval()
    with torch.no_grad():
        exact = model(X)
        model.bfloat16()
        found, dense = compiled(model, full)(X.bfloat16()), model(X.bfloat16())
    assert found.dtype == torch.bfloat16
    assert moved(found.float(), exact) < 3 * moved(dense.float(), exact)


def test_channels_last_stays(full: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
    model = model.eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    fast = compiled(model, full)
    with torch.no_grad():
        found, dense = fast(x), model(x)
        assert_equal(found, dense)
        assert found.is_contiguous(memory_format=torch.channels_last)
        model[1].running_mean.add_(0.5)
        assert_equal(fast(x), model(x))
    assert tdc.report(fast).replaced == 2


def test_calls_are_gathered_and_lead_to_the_plan_of_calibration() -> None:
    model = random_mlp().eval()
    batches = [torch.randn(16, 24) for _ in range(8)]
    fast = compiled(model, {"budget": "params=0.6", "calibrate_calls": 8, "inner": "eager"})
    with torch.no_grad():
        for k, batch in enumerate(batches):
            with pytest.raises(tdc.ModelError, match=r"8 more|7 more|no graph") if k < 2 else warnings.catch_warnings():
                tdc.wait(fast) if k < 2 else None
            assert torch.equal(fast(batch), model(batch))
        tdc.wait(fast, timeout=60)
        small = tdc.compress(model, batches[0], calibration=batches, budget="params=0.6", progress=False)
        assert torch.equal(fast(X), small(X))
        assert_equal(fast(torch.randn(5, 24)[:, :]), model(X[:5]), 100)
    (part,) = _parts.parts()
    assert part.outcome is not None
    assert part.outcome.plan == tdc.plan(model, X, calibration=batches, budget="params=0.6", progress=False)
    assert [site.error for site in tdc.report(fast).sites] == [site.error for site in tdc.report(small).sites]


def test_calls_of_several_shapes_are_gathered_together() -> None:
    model = random_mlp().eval()
    batches = [torch.randn(n, 24) for n in (8, 5, 9, 8)]
    fast = compiled(model, {"budget": "params=0.6", "calibrate_calls": 4, "inner": "eager"})
    with torch.no_grad():
        for batch in batches:
            fast(batch)
        tdc.wait(fast, timeout=60)
        small = tdc.compress(model, batches[0], calibration=batches, budget="params=0.6", progress=False)
        for batch in batches:
            assert_equal(fast(batch), small(batch))


def test_a_failure_in_the_background_leaves_the_model_dense(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(_parts, "decide", fail)
    model = random_mlp().eval()
    fast = compiled(model, {"budget": "params=0.6", "calibrate_calls": 1, "inner": "eager"})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "tdc"):
        fast(X)
        tdc.wait(fast, timeout=60)
        assert torch.equal(fast(X), model(X))
    assert "planning failed, it stays dense. RuntimeError: planted" in caplog.text
    with pytest.raises(tdc.ModelError, match="the model runs dense: RuntimeError: planted"):
        tdc.report(fast)


def test_a_failure_at_compilation_is_logged_or_with_strict_raised(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdc.frontends.fx import normalise

    def fail(*args: Any, **more: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(normalise, "make_fx", fail)
    model = random_mlp().eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "tdc"):
        assert torch.equal(compiled(model, {"budget": "params=0.6", "inner": "eager"})(X), model(X))
        assert "a graph is compiled without TDC. RuntimeError: planted" in caplog.text
        torch._dynamo.reset()
        with pytest.raises(Exception, match="planted"):
            compiled(model, HALF)(X)


def test_calibration_batches_are_read_by_the_names_of_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = random_mlp()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * scale

    model, scale = Two().eval(), torch.full((1,), 2.0)
    batches = [{"x": torch.randn(16, 24), "scale": scale} for _ in range(3)]
    small = tdc.compress(model, batches[0], calibration=batches, budget="params=0.6", progress=False)
    fast = compiled(model, {**HALF, "calibration": batches})
    with torch.no_grad():
        assert_equal(fast(X, scale), small(X, scale))


def test_wait_and_refresh_refuse_what_was_not_compiled() -> None:
    for door in (tdc.wait, tdc.refresh):
        with pytest.raises(tdc.ModelError, match="no graph that was compiled by TDC"):
            door(random_mlp())
        with pytest.raises(tdc.ModelError, match="give the module that was compiled"):
            door(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(tdc.ModelError, match="there is no report"):
        tdc.report(random_mlp())


def test_released_weights_are_free_and_refuse_what_would_crash(full: dict[str, Any]) -> None:
    model = random_mlp().eval()
    expected = copy.deepcopy(model)
    fast = compiled(model, {**full, "release_weights": True})
    with torch.no_grad():
        assert_equal(fast(X), expected(X))
        assert model[0].weight.untyped_storage().nbytes() == 0
        for batch in (6, 3, 5):
            x = torch.randn(batch, 24)
            assert_equal(fast(x), expected(x))
        with pytest.raises(tdc.ModelError, match="the dense weights of this module were released"):
            model(X)
        with pytest.raises(tdc.ModelError, match="the dense weights of this module were released"):
            model.state_dict()
        with pytest.raises(tdc.ModelError, match="released"):
            tdc.refresh(fast)


def test_a_weight_that_another_graph_needs_is_not_released() -> None:
    model = Broken().eval()
    plan = tdc.plan(model, X, budget="params=0.7", exclude="a", progress=False)
    fast = compiled(model, {"plan": plan, "inner": "eager", "release_weights": True})
    with torch.no_grad():
        fast(X)
        assert model.a.weight.untyped_storage().nbytes() > 0


def test_weights_of_one_storage_are_released_apart(full: dict[str, Any]) -> None:
    """As those of a mapped file are, whose storage cannot be resized."""
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    both = torch.from_numpy(torch.randn(2, 24, 24).numpy())
    for layer, part in zip((model[0], model[2]), both, strict=True):
        layer.weight = nn.Parameter(part)
    expected = copy.deepcopy(model)
    fast = compiled(model, {**full, "release_weights": True})
    with torch.no_grad():
        assert_equal(fast(X), expected(X))
        assert_equal(fast(X), expected(X))
    assert all(layer.weight.untyped_storage().nbytes() == 0 for layer in (model[0], model[2]))


def test_weights_that_a_call_reads_are_released_after_it() -> None:
    model = random_mlp().eval()
    fast = compiled(model, {**HALF, "calibrate_calls": 2, "release_weights": True})
    with torch.no_grad():
        fast(X)
        (part,) = (part for part in _parts.parts() if part.weights[0]() is model[0].weight)
        with part.reading_weights():
            fast(X)
            tdc.wait(fast)
            assert part.state == "compressed"
            assert model[0].weight.untyped_storage().nbytes() > 0
            small = fast(X)
        assert model[0].weight.untyped_storage().nbytes() == 0
        assert_equal(fast(X), small)


def test_planning_in_the_background_draws_no_random_numbers_of_others() -> None:
    model = random_mlp().eval()
    fast = compiled(model, {**HALF, "calibrate_calls": 2})
    with torch.no_grad():
        fast(X)
        torch.manual_seed(7)
        expected = [torch.rand(1) for _ in range(50)]
        torch.manual_seed(7)
        fast(X)
        found = []
        for _ in range(25):
            found.append(torch.rand(1))
            time.sleep(0.002)
        tdc.wait(fast)
        found += [torch.rand(1) for _ in range(25)]
    assert found == expected
