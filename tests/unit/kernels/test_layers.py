from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import kernels
from tdc.frontends.nn.factored import FactoredConv, FactoredLinear
from tdc.frontends.nn.sharing import Sharing
from tdc.ir import Block, Equation, Op
from tdc.kernels import layers

pytestmark = pytest.mark.usefixtures("compiled")

SHARED = Block(
    (("v", (7, 24)), ("u", (20, 7))),
    (
        Op("matmul", "t0", ("x", "v"), Equation.parse("b i, r i -> b r")),
        Op("matmul", "t1", ("t0", "u"), Equation.parse("b r, o r -> b o")),
    ),
    "t1",
    (("o", 20), ("i", 24), ("r", 7)),
)
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small() -> nn.Module:
    """Factored layers of several kinds, in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 8, bias=False))
    return tdc.compress(model, X, budget="params=0.6", metric="weight", progress=False).eval()


def factored(model: nn.Module) -> list[FactoredLinear]:
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


def assert_same(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_kernels_run_where_they_were_faster_and_nowhere_else(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    plain = copy.deepcopy(small)
    remarks = kernels.accelerate(small, rows=(4, 1, 8))
    assert len(remarks) == len([m for m in small.modules() if isinstance(m, (FactoredLinear, nn.Linear))]) > 0
    assert "2.00 times as fast at 1 rows, 1.00 times as fast at 4 rows, 3.00 times as fast at 8 rows" in str(remarks[0])
    for rows, used in ((1, True), (2, False), (4, False), (5, True), (8, True), (9, False)):
        x = torch.randn(rows, 24)
        calls.clear()
        with torch.no_grad():
            assert_same(small(x), plain(x))
        assert calls == ([rows] * len(remarks) if used else []), rows
    with torch.inference_mode():
        assert_same(small(X[None, :1]), plain(X[None, :1]))
    assert calls == [1] * len(remarks)


@pytest.mark.parametrize(("last", "gain", "above"), [(256, 1.5, True), (256, 1.15, False), (128, 3.0, False)])
def test_many_rows_stand_for_more_where_the_gain_is_large(
    small: nn.Module, gains: dict[int, float], calls: list[int], last: int, gain: float, above: bool
) -> None:
    gains[last] = gain
    kernels.accelerate(small, rows=(1, last), dense=False)
    for rows, used in ((last, True), (last + 1, above), (1000, above)):
        calls.clear()
        with torch.no_grad():
            small(torch.randn(rows, 24))
        assert calls == ([rows] * len(factored(small)) if used else []), rows


def test_what_a_kernel_does_not_take_runs_as_before(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    plain = copy.deepcopy(small)
    kernels.accelerate(small, rows=(8,))
    small(X).sum().backward()
    plain(X).sum().backward()
    for mine, its in zip(small.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, its.grad)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(small(X), plain(X))
        assert torch.equal(torch.vmap(small)(X), torch.vmap(plain)(X))
        assert torch.equal(torch.jit.trace(small, X, check_trace=False)(2 * X), plain(2 * X))
        assert torch.equal(small.double()(X.double()), plain.double()(X.double()))
    assert calls == []


def test_with_frozen_factors_no_gradient_is_needed(small: nn.Module, gains: dict[int, float], calls: list[int]) -> None:
    kernels.accelerate(small.requires_grad_(False), rows=(8,))
    small(X)
    assert calls != []
    calls.clear()
    x = X.clone().requires_grad_()
    small(x).sum().backward()
    assert x.grad is not None
    assert calls == []


def test_another_number_of_threads_was_not_measured(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    kernels.accelerate(small, rows=(8,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with torch.no_grad():
            small(X)
    finally:
        torch.set_num_threads(before)
    assert calls == []


def test_compilers_see_stock_operators(small: nn.Module, gains: dict[int, float], calls: list[int]) -> None:
    plain = copy.deepcopy(small)
    kernels.accelerate(small, rows=(8,))
    with torch.no_grad():
        program = torch.export.export(small, (X,))
        assert "tdc" not in str(program.graph)
        compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
        assert_same(compiled(X), plain(X))
        traced = torch.fx.experimental.proxy_tensor.make_fx(small)(X)
        assert_same(traced(2 * X), plain(2 * X))
    assert calls == []


def test_kernels_are_left_behind_by_files_and_go_with_copies(
    small: nn.Module, gains: dict[int, float], calls: list[int], tmp_path: Path
) -> None:
    plain = copy.deepcopy(small)
    kernels.accelerate(small, rows=(8,), dense=False)
    with torch.no_grad():
        right = plain(X)
        other = copy.deepcopy(small)
        for parameter in small.parameters():
            parameter.zero_()
        assert_same(other(X), right)
        assert len(calls) == len(factored(other)) > 0
        calls.clear()
        torch.save(other, tmp_path / "small.pt")
        assert torch.equal(torch.load(tmp_path / "small.pt", weights_only=False)(X), right)
        kernels.accelerate(other, rows=())
        assert torch.equal(other(X), right)
    assert calls == []


def test_factors_that_change_are_read_at_every_call(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    kernels.accelerate(small, rows=(8,), dense=False)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.5)
        right = copy.deepcopy(small).double()(X.double()).float()
        assert_same(small(X), right)
        for parameter in small.parameters():
            parameter.data = parameter.data.clone()
        assert_same(small(X), right)
    assert len(calls) == 2 * len(factored(small))


def test_layers_that_share_factors_compute_with_them_once(gains: dict[int, float], calls: list[int]) -> None:
    sharing, first = Sharing(frozenset({"v"})), torch.randn(7, 24)
    shared = nn.ModuleList(
        FactoredLinear(
            nn.Linear(24, 20), SHARED, {"v": first, "u": torch.randn(20, 7)}, "any", torch.randn(20), sharing
        )
        for _ in range(2)
    )
    with torch.no_grad():
        before = [layer(X) for layer in shared]
        remarks = kernels.accelerate(shared, rows=(8,))
        said = "one product: 3.00 times as fast at 8 rows"
        assert [remark.reason for remark in remarks] == [f"{said}; what it shares: {said}"] * 2
        assert_same(torch.stack([layer(X) for layer in shared]), torch.stack(before))
        assert calls == [3, 3, 3], "the shared product once"
        assert sharing._kept is None, "each layer has had what they share"
        calls.clear()
        wide = torch.randn(9, 24)
        assert_same(shared[1](wide), copy.deepcopy(shared)[1](wide))
        assert calls == []


def test_an_example_measures_what_layers_share_at_their_rows(small: nn.Module, gains: dict[int, float]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sharing, first = Sharing(frozenset({"v"})), torch.randn(7, 24)
            factors = [{"v": first, "u": torch.randn(20, 7)} for _ in range(2)]
            made = [FactoredLinear(nn.Linear(24, 20), SHARED, one, "any", torch.randn(20), sharing) for one in factors]
            self.one, self.two = made

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.one(x) - self.two(x)
            return result

    said = "one product: 3.00 times as fast at 8 rows"
    remarks = kernels.accelerate(Two(), example={"x": torch.randn(8, 24)})
    assert [remark.reason for remark in remarks] == [f"{said}; what it shares: {said}"] * 2


@pytest.mark.parametrize("name", ["tucker2", "output_svd", "input_svd", "spatial_svd", "tt_conv", "pivoted"])
def test_convolutions_run_on_kernels_at_the_shapes_of_the_example(
    name: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding="same", padding_mode="reflect")
    )
    x = torch.randn(2, 24, 13, 11)
    small = tdc.compress(model, x, budget="params=0.5", metric="weight", allow=name, progress=False).train()
    plain = copy.deepcopy(small).eval()
    shapes: list[tuple[int, ...]] = []

    def gain(match: kernels.Match, factors: object, bias: object, shape: tuple[int, ...], **how: int) -> float:
        shapes.append(tuple(shape))
        return 2.0

    monkeypatch.setattr(layers, "measured", gain)
    convolutions = [module for module in small.modules() if isinstance(module, FactoredConv)]
    assert convolutions
    remarks = kernels.accelerate(small)
    assert all("an example input, and there is none" in remark.reason for remark in remarks)
    remarks = kernels.accelerate(small, example=x)
    assert small.training
    assert [remark.reason.startswith("convolutions: ") for remark in remarks] == [True] * len(convolutions)
    assert "2.00 times as fast at 2 x " in remarks[0].reason
    assert {shape[0] for shape in shapes} == {2}
    with torch.no_grad():
        assert_same(small(x), plain(x))
        assert len(calls) == len(convolutions)
        calls.clear()
        for other in (x[:1], x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(small(other), plain(other))
        assert_same(small(x[0]), plain(x[0]))
    assert calls == []
    small(x).sum().backward()
    assert calls == []


def test_an_example_measures_linear_layers_at_its_rows(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    plain = copy.deepcopy(small)
    remarks = kernels.accelerate(small, example=(torch.randn(2, 4, 24),))
    assert all("3.00 times as fast at 8 rows" in remark.reason for remark in remarks)
    with torch.no_grad():
        for rows, used in ((8, True), (7, False), (1, False)):
            calls.clear()
            x = torch.randn(rows, 24)
            assert_same(small(x), plain(x))
            assert bool(calls) == used


def test_several_examples_are_measured_each_at_its_rows(
    small: nn.Module, gains: dict[int, float], calls: list[int]
) -> None:
    remarks = kernels.accelerate(small, example=[(torch.randn(2, 4, 24),), (torch.randn(1, 24),)])
    for rows in (1, 8):
        assert all(f"times as fast at {rows} rows" in remark.reason for remark in remarks)


def test_a_slower_kernel_is_not_used(small: nn.Module, gains: dict[int, float], calls: list[int]) -> None:
    gains[8] = 1.04
    remarks = kernels.accelerate(small, rows=(8,))
    assert all("not used, 1.04 times as fast at 8 rows" in remark.reason for remark in remarks)
    with torch.no_grad():
        small(X)
    assert calls == []


def test_other_dtypes_are_not_measured(small: nn.Module) -> None:
    remarks = kernels.accelerate(small.double(), rows=(8,))
    assert all("float32, on the processor" in remark.reason for remark in remarks)


def test_models_without_linear_or_factored_layers_have_no_remarks() -> None:
    assert kernels.accelerate(nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())) == ()
    assert kernels.accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), dense=False) == ()


class Special(nn.Linear):
    """Not torch's own."""


def test_dense_layers_run_on_kernels_and_stay_layers_of_torch(
    gains: dict[int, float], calls: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), Special(32, 24), nn.Linear(24, 40, bias=False), nn.Linear(24, 3)).eval()
    model[3] = nn.Identity()
    names = [str(module) for module in model]
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    remarks = kernels.accelerate(model, rows=(4, 8))
    assert [remark.site for remark in remarks] == ["0", "2"]
    assert remarks[0].reason == "one product: 1.00 times as fast at 4 rows, 3.00 times as fast at 8 rows"
    assert (names, keys) == ([str(module) for module in model], list(model.state_dict()))
    with torch.no_grad():
        for rows, used in ((8, True), (3, False)):
            calls.clear()
            assert_same(model(torch.ones(rows, 24)), plain(torch.ones(rows, 24)))
            assert calls == [rows] * (2 if used else 0)
        calls.clear()
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert [type(module) for module in other] == [nn.Linear, Special, nn.Linear, nn.Identity]
            assert_same(other(torch.ones(8, 24)), plain(torch.ones(8, 24)))
        assert calls == []
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert calls == []
    kernels.accelerate(model, ())
    assert [type(module) for module in model] == [nn.Linear, Special, nn.Linear, nn.Identity]
    assert [set(vars(module)) for module in model] == [set(vars(module)) for module in plain]


def test_an_example_that_does_not_run_leaves_all_as_it_was(small: nn.Module, gains: dict[int, float]) -> None:
    before = [type(module) for module in small.modules()]
    with pytest.raises(RuntimeError):
        kernels.accelerate(small, example=torch.randn(2, 5))
    assert [type(module) for module in small.modules()] == before
    assert not any(module.on_kernels for module in factored(small))


def test_the_measurement_gives_a_ratio_and_leaves_the_model_alone(small: nn.Module) -> None:
    before = [parameter.clone() for parameter in small.parameters()]
    state = torch.get_rng_state()
    layer = factored(small)[0]
    found = kernels.match(layer.block)
    assert isinstance(found, kernels.Match)
    gain = layers.measured(found, layer.factors, layer.bias, (2, 24))
    assert 0 < gain < 1000
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


@pytest.mark.parametrize("capturing", [False, True])
def test_on_a_gpu_calls_and_captured_ones_are_chosen_by_themselves(
    small: nn.Module, gains: dict[int, float], calls: list[int], monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    """With kernels that only claim to run on a GPU."""
    plain = layers.match
    monkeypatch.setattr(layers, "measured_captured", lambda match, factors, bias, shape, **how: 4.0 - gains[shape[0]])

    def claimed(block: Block, device: str) -> kernels.Match:
        found = plain(block, device)
        assert isinstance(found, kernels.Match)
        return dataclasses.replace(found, kernel=dataclasses.replace(found.kernel, device="cuda"))

    monkeypatch.setattr(layers, "match", claimed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    remarks = kernels.accelerate(small, rows=(1, 4, 8))
    assert "3.00 times as fast at 8 rows; in a CUDA graph 2.00 times as fast at 1 rows, 3.00" in str(remarks[0])
    used = {}
    with torch.no_grad():
        for rows in (1, 4, 8):
            calls.clear()
            small(torch.randn(rows, 24))
            used[rows] = bool(calls)
    assert used == {1: True, 4: capturing, 8: not capturing}
    gains.update({1: 1.0, 8: 1.0})
    kernels.accelerate(small, rows=(1, 8))
    calls.clear()
    with torch.no_grad():
        small(X[:1])
    assert bool(calls) == capturing
