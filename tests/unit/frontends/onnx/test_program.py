"""Running: taps, outputs with other weights, calibration data, and what the model costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tdc.errors import CalibrationError, ModelError, PlanError
from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import Change
from tdc.ir import Site

Opened = Callable[[onnx.ModelProto], OnnxProgram]
Build = Callable[..., onnx.ModelProto]
F = np.dtype("float32")


def first(program: OnnxProgram, data: Any) -> dict[str, Any]:
    return next(iter(program.batches(data)))


def taps(program: OnnxProgram, data: Any) -> list[tuple[int, Tensor]]:
    seen: list[tuple[int, Tensor]] = []

    def tap(site: Site, activation: Tensor) -> None:
        seen.append((site.order, activation))

    program.observe(first(program, data), program.sites()[0], tap)
    return seen


def test_taps_show_what_enters_the_site(spelling: str, source: str, case: Callable[..., Any]) -> None:
    made = case(spelling, source)
    ((order, activation),) = taps(made.program, made.batch)
    assert order == 0
    assert np.array_equal(activation.numpy(), made.activation)


def test_outputs_with_and_without_another_weight(spelling: str, source: str, case: Callable[..., Any]) -> None:
    made = case(spelling, source, np.float64)
    batch = first(made.program, made.batch)
    assert np.allclose(made.program.outputs(batch, {})["y"], made.output, rtol=1e-12, atol=1e-12)
    zero = made.program.outputs(batch, {0: Change(torch.zeros(10, 6, dtype=torch.float64))})["y"]
    doubled = made.program.outputs(batch, {0: Change(torch.from_numpy(2 * made.weight))})["y"]
    assert np.allclose(doubled, 2 * made.output - zero.numpy(), rtol=1e-12, atol=1e-12)
    assert np.allclose(made.program.outputs(batch, {})["y"], made.output, rtol=1e-12, atol=1e-12)


def two_layers(build: Build, **options: Any) -> onnx.ModelProto:
    """h = x A, y = relu(h) B, y2 = relu(h) A."""
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((6, 6)).astype(F), "b": rng.standard_normal((6, 3)).astype(F)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
        helper.make_node("MatMul", ["r", "a"], ["y2"], name="third"),
        helper.make_node("ArgMax", ["y"], ["best"], name="best"),
    ]
    outputs = {"y": F, "y2": F, "best": np.dtype("int64")}
    return build(nodes, {"x": (F, ["batch", 6])}, outputs, tensors, **options)


def test_one_activation_is_one_tensor_and_tied_sites_tap_once_per_use(build: Build, opened: Opened) -> None:
    program = opened(two_layers(build))
    x = np.ones((4, 6), F)
    seen = taps(program, {"x": x})
    assert [order for order, _ in seen] == [0, 0, 1]
    hidden = np.maximum(x @ program.weight(program.sites()[0][0]).numpy().T, 0)
    assert np.array_equal(seen[0][1].numpy(), x)
    assert np.allclose(seen[1][1].numpy(), hidden, rtol=1e-6)
    assert seen[1][1] is seen[2][1]
    taps(program, {"x": x})
    assert len(program._tapped) == 1


def test_outputs_are_the_floating_ones_and_replace_all_uses(build: Build, opened: Opened) -> None:
    program = opened(two_layers(build))
    x = np.ones((4, 6), F)
    identity = torch.eye(6)
    out = program.outputs({"x": x}, {0: Change(identity)})
    assert set(out) == {"y", "y2"}
    assert np.array_equal(out["y2"].numpy(), x)


def test_the_model_is_not_changed_by_running(build: Build, opened: Opened) -> None:
    import onnx_ir as ir

    program = opened(two_layers(build))
    before = ir.to_proto(program.model)
    taps(program, {"x": np.ones((1, 6), F)})
    program.outputs({"x": np.ones((1, 6), F)}, {})
    program.finish()
    assert ir.to_proto(program.model) == before


class Reader:
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.left = list(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


ROWS = np.arange(12, dtype=F).reshape(2, 6)
FORMS: dict[str, Callable[[], Any]] = {
    "reader": lambda: Reader([{"x": ROWS}]),
    "list of dicts": lambda: [{"x": ROWS}],
    "one dict": lambda: {"x": ROWS},
    "tuples": lambda: ((t,) for t in [ROWS]),
    "bare arrays": lambda: [torch.from_numpy(ROWS)],
    "loader": lambda: DataLoader(TensorDataset(torch.from_numpy(ROWS), torch.tensor([0, 1])), batch_size=2),
    "tensors": lambda: [{"x": torch.from_numpy(ROWS)}],
    "float64": lambda: [{"x": ROWS.astype(np.float64)}],
    "bfloat16": lambda: [{"x": torch.from_numpy(ROWS).bfloat16()}],
    "integers": lambda: [{"x": ROWS.astype(np.int32)}],
    "nested lists": lambda: [{"x": ROWS.tolist()}],
}


@pytest.mark.parametrize("form", FORMS)
def test_calibration_data_in_all_forms(form: str, build: Build, opened: Opened) -> None:
    (batch,) = opened(two_layers(build)).batches(FORMS[form]())
    assert list(batch) == ["x"]
    assert batch["x"].dtype == F
    assert np.array_equal(batch["x"], ROWS)


BAD: dict[str, tuple[Any, str]] = {
    "text": ("data.npz", "calibration data of type str cannot be read"),
    "number": (3, "calibration data of type int cannot be read"),
    "empty": ([], "the calibration data is empty"),
    "unknown": ([{"x": ROWS, "z": ROWS}], r"unknown inputs \['z'\]; the model has \['x'\]"),
    "missing": ([{}], r"lacks the inputs \['x'\]"),
    "short": ([()], "has 0 values for the 1 inputs x"),
    "rank": ([{"x": ROWS[0]}], r"input 'x' has shape \[6\]; the model wants \['batch', 6\]"),
    "size": ([{"x": ROWS[:, :5]}], r"input 'x' has shape \[2, 5\]; the model wants \['batch', 6\]"),
    "strings": ([{"x": np.full((2, 6), "a")}], "input 'x' has dtype str"),
    "complex": ([{"x": ROWS.astype(np.complex64)}], "input 'x' has dtype complex64; the model wants float32"),
    "overflow": ([{"x": np.full((1, 6), 1e300)}], "float64; .* float32, and some of its entries do not fit"),
    "inexact": ([{"x": np.full((1, 6), 2**24 + 1)}], "int64; .* float32, and some of its entries do not fit"),
    "batch type": ([7], "batch 0 is of type int"),
}


@pytest.mark.parametrize("name", BAD)
def test_calibration_data_that_does_not_fit(name: str, build: Build, opened: Opened) -> None:
    data, message = BAD[name]
    with pytest.raises(CalibrationError, match=message):
        list(opened(two_layers(build)).batches(data))


def test_integer_inputs(build: Build, opened: Opened) -> None:
    nodes = [helper.make_node("Gather", ["t", "ids"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    tensors = {"t": np.ones((9, 6), F), "w": np.ones((6, 4), F)}
    program = opened(build(nodes, {"ids": (np.dtype("int64"), ["b"])}, {"y": F}, tensors))
    for given in (np.array([1, 2], np.int32), np.array([True, False]), torch.tensor([3])):
        assert first(program, {"ids": given})["ids"].dtype == np.int64
    with pytest.raises(CalibrationError, match="input 'ids' has dtype float32; the model wants int64"):
        first(program, {"ids": np.array([1.0], F)})
    with pytest.raises(CalibrationError, match="the model does not run on this batch"):
        taps(program, {"ids": np.array([99])})
    with pytest.raises(CalibrationError, match="the model does not run on this batch"):
        program.outputs({"ids": np.array([99])}, {})


def test_inputs_with_a_default_may_be_left_out(build: Build, opened: Opened) -> None:
    nodes = [helper.make_node("Mul", ["x", "s"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    tensors = {"s": np.array([2.0], F), "w": np.ones((6, 4), F)}
    program = opened(build(nodes, {"x": (F, ["b", 6]), "s": (F, [1])}, {"y": F}, tensors))
    x = np.ones((1, 6), F)
    assert float(program.outputs(first(program, [(x,)]), {})["y"][0, 0]) == 12
    assert float(program.outputs(first(program, {"x": x, "s": np.array([3.0], F)}), {})["y"][0, 0]) == 18


def test_a_model_that_the_runtime_does_not_know_is_a_model_error(build: Build, opened: Opened) -> None:
    proto = two_layers(build)
    proto.opset_import.add(domain="nobody", version=1)
    proto.graph.node[1].domain = "nobody"
    program = opened(proto)
    assert len(program.sites()[0]) == 2
    with pytest.raises(ModelError, match="onnxruntime does not run the model"):
        taps(program, {"x": np.ones((1, 6), F)})


def test_cost_counts_every_tensor_once(build: Build, opened: Opened) -> None:
    proto = two_layers(build)
    program = opened(proto)
    assert (program.cost().params, program.cost().bytes) == (6 * 6 + 6 * 3, 4 * (6 * 6 + 6 * 3))
    value = helper.make_tensor("k", onnx.TensorProto.INT64, [3], [1, 2, 3])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    cost = opened(proto).cost()
    assert (cost.params, cost.bytes) == (54, 4 * 54 + 24)


def test_large_weights_are_lent_to_the_runtime(build: Build, opened: Opened) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 48)).astype(F)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    program = opened(build(nodes, {"x": (F, ["b", 64])}, {"y": F}, {"w": weight, "v": np.ones((48, 64), F)}))
    x = np.ones((2, 64), F)
    seen = taps(program, {"x": x})
    assert np.allclose(seen[1][1].numpy(), x @ weight, atol=1e-4)
    session, _ = next(iter(program._tapped.values()))
    assert len(session._kept) == 2


def test_a_site_of_another_model_is_a_plan_error(build: Build, opened: Opened) -> None:
    program = opened(two_layers(build))
    (site, *_), _ = program.sites()
    import dataclasses

    with pytest.raises(PlanError, match="there is none of order 9"):
        program.weight(dataclasses.replace(site, order=9))
