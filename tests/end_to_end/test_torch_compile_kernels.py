"""TDC's own operators in the graphs of the backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.fx import timing
from tdc.frontends.fx.export import open_exported
from tdc.frontends.fx.timing import Stopwatch
from tdc.kernels import Match, graphs
from tdc.kernels.c.two_products import available
from tdc.kernels.measure import Timed

pytestmark = pytest.mark.skipif(available() is not None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the measurement is to find, and the kernels and shapes that were measured."""
    found: dict[str, Any] = {"gain": 2.0, "seen": []}

    def timed(match: Match, factors: Any, bias: Any, shape: tuple[int, ...], **how: Any) -> Timed:
        found["seen"].append((match.kernel.name, shape))
        return Timed((1.0,), (found["gain"],))

    monkeypatch.setattr(graphs, "timed", timed)
    return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that graphs got."""
    names: list[str] = []
    plain = Match.__call__

    def call(match: Match, x: Any, factors: Any, bias: Any = None) -> Any:
        names.append(match.kernel.name)
        return plain(match, x, factors, bias)

    monkeypatch.setattr(Match, "__call__", call)
    return names


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 24, 3, stride=2)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.two(torch.relu(self.one(x)))))  # type: ignore[no-any-return]


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48, bias=False), nn.Tanh(), nn.Linear(48, 40))
    return model.eval(), torch.randn(2, 5, 48)


def windows() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Windows().eval(), torch.randn(3, 8, 11, 9)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Any:
    given = {"budget": "params=0.5", "metric": "input", "calibration": [(x,)], "strict": True, **options}
    return torch.compile(copy.deepcopy(model), backend="tdc", options=given)


@pytest.mark.parametrize("case", [mlp, windows])
@pytest.mark.parametrize("allow", [None, "svd", "tucker2"])
def test_graphs_have_kernels_where_these_are_faster(
    case: Any, allow: str | None, gain: dict[str, Any], written: list[str]
) -> None:
    model, x = case()
    if allow == ("tucker2" if case is mlp else "svd"):
        pytest.skip("the format is for other layers")
    options = {} if allow is None else {"allow": allow}
    with torch.no_grad():
        plain = compiled(model, x, inner="eager", kernels="off", **options)(x)
        assert not written
        fast = compiled(model, x, inner="eager", **options)
        torch.testing.assert_close(fast(x), plain, rtol=1e-4, atol=1e-5)
        assert written
        first = len(gain["seen"])
        other = torch.cat([x, x])  # new sizes: Dynamo's next graph
        torch.testing.assert_close(fast(other)[: len(x)], plain, rtol=1e-4, atol=1e-4)
    assert tdc.report(fast).sites
    assert first
    assert all(shape[0] in (3, 10) for _, shape in gain["seen"][:first])


def test_graphs_have_none_where_they_are_no_faster(gain: dict[str, Any], written: list[str]) -> None:
    gain["gain"] = 1.0
    model, x = mlp()
    with torch.no_grad():
        compiled(model, x, inner="eager")(x)
    assert gain["seen"]
    assert not written


@pytest.mark.parametrize("case", [mlp, windows])
@pytest.mark.parametrize("freezing", ["off", "on"])
def test_inductor_takes_those_for_linear_layers(
    case: Any, freezing: str, gain: dict[str, Any], written: list[str]
) -> None:
    model, x = case()
    with torch.no_grad():
        plain = compiled(model, x, inner="eager", kernels="off")(x)
        torch.testing.assert_close(compiled(model, x, freezing=freezing)(x), plain, rtol=1e-4, atol=1e-4)
    assert bool(written) == (case is mlp), "its own convolutions are faster in a graph than alone"


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_budgets_of_time_count_what_the_graph_gets(kernels: str, gain: dict[str, Any], monkeypatch: Any) -> None:
    ran: list[int] = []
    plain = Stopwatch.site

    def site(watch: Stopwatch, *what: Any) -> list[float]:
        met = watch.met[what[0].order][0]
        graphs = [timing._replaced(met, block, 0, watch.kernels)[0] for block in what[1]]
        ran.extend("tdc" in str(node.target) for run in graphs for node in run.func.__self__.graph.nodes)  # type: ignore[attr-defined]
        return plain(watch, *what)

    monkeypatch.setattr(Stopwatch, "site", site)
    model, x = mlp()
    with torch.no_grad():
        fast = compiled(model, x, budget="latency_ms=1000", inner="eager", kernels=kernels)
        torch.testing.assert_close(fast(x), model(x))
    assert ran
    assert any(ran) == (kernels == "auto")


def test_other_dtypes_and_autocast_run_on_stock_operators(gain: dict[str, Any], written: list[str]) -> None:
    model, x = mlp()
    with torch.no_grad():
        compiled(model.double(), x.double(), inner="eager")(x.double())
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(model, x, inner="eager")(x).dtype is torch.bfloat16
    assert not written


@pytest.mark.parametrize("budget", ["params=0.9", "latency_ms=1000"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_autocast_inside_a_model_keeps_its_dtype(
    inner: str, budget: str, gain: dict[str, Any], written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_with: list[Any] = []
    plain = Stopwatch.model
    monkeypatch.setattr(Stopwatch, "model", lambda watch: timed_with.append(watch.kernels) or plain(watch))

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                first, second = self.one(x), self.two(x)
            result: Tensor = first @ second.T
            return result

    torch.manual_seed(0)
    model, x = Casting().eval(), torch.randn(5, 48)
    with torch.no_grad():
        found = compiled(model, x, inner=inner, budget=budget)(x)
        assert found.dtype is model(x).dtype is torch.bfloat16
    assert not written
    assert timed_with == ([] if budget.startswith("params") else [None])


def test_graphs_are_timed_without_what_keeps_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    program = open_exported(torch.export.export(model, (x,)))
    run, seeds = program.bounds[0].repeated((x,)), list[int]()
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    with torch.no_grad():
        torch.testing.assert_close(run(), model(x))
    assert not seeds


def test_weights_that_change_reach_the_kernels(gain: dict[str, Any], written: list[str]) -> None:
    found = {}
    for kernels in ("off", "auto"):
        torch._dynamo.reset()
        own, x = mlp()
        assert isinstance(own, nn.Sequential)
        options = {"budget": "params=0.5", "metric": "input", "calibration": [(x,)], "inner": "eager", "strict": True}
        with torch.no_grad():
            fast: Any = torch.compile(own, backend="tdc", options={**options, "kernels": kernels})
            before = fast(x)
            own.load_state_dict({name: 2 * tensor for name, tensor in own.state_dict().items()})
            found[kernels] = (before, fast(x))
    assert written
    for plain, ours in zip(found["off"], found["auto"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert (found["auto"][1] - found["auto"][0]).abs().max() > 0.1


def test_an_unknown_value_of_the_option_is_refused() -> None:
    model, x = mlp()
    with torch.no_grad(), pytest.raises(Exception, match="unknown kernels 'on'"):
        compiled(model, x, kernels="on")(x)
