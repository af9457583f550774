"""Files and programs as exporters write them: values that nothing reads, defaults, casts, state, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

import tdc
from tdc.__main__ import main

pytestmark = pytest.mark.usefixtures("dynamo")
Entries = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def written(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], output: list[Any], values: Entries
) -> Path:
    def info(name: str, sizes: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    stored = [numpy_helper.from_array(value, name) for name, value in values.items()]
    given = [info(name, sizes) for name, sizes in inputs.items()]
    graph = helper.make_graph(nodes, "g", given, [info("y", output)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(path: Path, feeds: Entries) -> np.ndarray:
    found: np.ndarray = onnxruntime.InferenceSession(str(path)).run(None, feeds)[0]
    return found


def product(*inputs: str, to: str = "y") -> onnx.NodeProto:
    return helper.make_node("MatMul", list(inputs), [to])


def test_values_that_nothing_reads_are_no_obstacle(tmp_path: Path) -> None:
    values = {"w": normal(32, 48), "unused": normal(20, 20)}
    source = written(tmp_path / "in.onnx", [product("x", "w")], {"x": ["n", 32]}, ["n", 48], values)
    data = [{"x": normal(64, 32)}]
    report = tdc.compress_onnx(source, tmp_path / "out.onnx", budget="params=0.5", calibration=data, progress=False)
    assert report.replaced == 1


def test_an_input_with_a_default_value(tmp_path: Path) -> None:
    values = {"w": normal(32, 48), "x": normal(4, 32)}
    source = written(tmp_path / "in.onnx", [product("x", "w")], {"x": [4, 32]}, [4, 48], values)
    tdc.compress_onnx(source, tmp_path / "out.onnx", budget="params=0.5", progress=False)
    assert run(tmp_path / "out.onnx", {}).shape == (4, 48)


def test_a_cast_that_cuts_fractions_off_is_no_constant(tmp_path: Path) -> None:
    nodes = [
        product("x", "w", to="h"),
        helper.make_node("Cast", ["b"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Cast", ["whole"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["h", "c"], ["y"]),
    ]
    values = {"w": normal(20, 2) @ normal(2, 24), "b": 3 * normal(24) + np.float32(0.5)}
    source, feeds = written(tmp_path / "in.onnx", nodes, {"x": ["n", 20]}, ["n", 24], values), {"x": normal(5, 20)}
    data = [{"x": normal(64, 20)}]
    tdc.compress_onnx(source, tmp_path / "out.onnx", budget="params=0.75", calibration=data, progress=False)
    np.testing.assert_allclose(run(tmp_path / "out.onnx", feeds), run(source, feeds), atol=1e-4)


def test_a_gemm_is_timed_without_what_it_adds(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"])
    sizes = {"x": [16, 256], "c": [16, 256]}
    source = written(tmp_path / "in.onnx", [node], sizes, [16, 256], {"w": normal(256, 256)})
    data = [{name: normal(*shape) for name, shape in sizes.items()}]
    report = tdc.compress_onnx(source, tmp_path / "out.onnx", budget="latency=0.999", calibration=data, progress=False)
    assert len(report.sites) == 1


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


class Noisy(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y)


class Writing(Two):
    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.add_(self.a(x))
        out: Tensor = self.b(torch.relu(cache))
        return out


class Masked(Two):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x).masked_fill(mask, float("-inf"))


class Branching(Two):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (super().forward(x),))
        return out


@pytest.mark.parametrize("kind", [Noisy, Writing, Masked, Branching])
def test_programs_with_random_numbers_state_infinities_and_branches(kind: type[Two]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    others: dict[type[Two], tuple[Tensor, ...]] = {Writing: (torch.zeros(4, 32),), Masked: (x > 1,)}
    program = torch.export.export(kind().eval(), (x, *others.get(kind, ())))
    small = tdc.compress_export(program, budget="params=0.5", metric="weight", progress=False)
    assert tdc.report(small).replaced


def test_weights_that_are_read_through_views_leave_the_program() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(o, i) / i**0.5) for o, i in ((64, 48), (48, 64)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a.T) @ self.b.transpose(0, 1)

    torch.manual_seed(0)
    program = torch.export.export(Turned().eval(), (torch.randn(32, 48),))
    small = tdc.compress_export(program, budget="params=0.5", metric="weight", progress=False)
    report = tdc.report(small)
    assert report.replaced == 2
    assert report.model_after.params <= 0.5 * report.model_before.params
    assert {"a", "b"}.isdisjoint(small.state_dict)


def test_running_the_result_leaves_the_state_of_the_source_alone() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            out: Tensor = self.layer(x) * self.calls
            return out

    x = torch.randn(4, 32)
    program = torch.export.export(Counter(), (x,))
    small = tdc.compress_export(program, budget="params=0.5", metric="weight", progress=False)
    small.module()(x)
    assert float(program.state_dict["calls"]) == 0


def test_bounds_of_sizes_that_follow_from_others_stay() -> None:
    sizes = {"x": {0: 2 * Dim("half", min=1, max=20)}}
    program = torch.export.export(Two().eval(), (torch.randn(4, 32),), dynamic_shapes=sizes)
    small = tdc.compress_export(program, budget="params=0.5", metric="weight", progress=False)
    assert small.module()(torch.randn(40, 32)).shape == (40, 32)
    for wrong in (41, 100):
        with pytest.raises((AssertionError, RuntimeError), match="Guard failed"):
            small.module()(torch.randn(wrong, 32))


def test_options_that_nothing_would_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"w": normal(32, 48), "v": normal(48, 32)}
    nodes = [product("x", "w", to="h"), product("h", "v")]
    source = str(written(tmp_path / "in.onnx", nodes, {"x": ["n", 32]}, ["n", 32], values))
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out.onnx")
    assert main(["plan", source, "--budget", "params=0.5", "-o", plan, "--quiet"]) == 0
    for wrong, told in (
        (["plan", source, "--pareto", "--paths"], "--pareto"),
        (["compress", source, out, "--plan", plan, "--allow", "svd"], "--allow"),
        (["compress", source, out, "--plan", plan, "--metric", "weight"], "--metric"),
        (["compress", source, out, "--plan", plan, "--exclude", "w"], "excluded"),
    ):
        capsys.readouterr()
        assert main([*wrong, "--quiet"]) != 0
        assert told in capsys.readouterr().err
    assert not Path(out).exists()


def test_images_in_another_memory_format_are_not_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    small = tdc.compress(model, (x,), budget="params=0.2", metric="weight", allow="tucker2", progress=False)
    remarks = tdc.kernels.accelerate(small, example=x)
    assert all("not used" in remark.reason for remark in remarks)
