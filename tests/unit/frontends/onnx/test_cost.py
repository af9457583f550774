"""What a run costs: multiply-adds by the closed formulas, and the peak of the activations."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from onnx import helper

from tdc.frontends.onnx import OnnxProgram

from .convolutions import Spec, assembled, example, model_of, reference, specs

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.float32


@settings(suppress_health_check=list(HealthCheck), max_examples=60)
@given(spec=specs())
def test_multiply_adds_of_convolutions(spec: Spec, opened: Opened) -> None:
    model, batch = model_of(spec), {"x": example(spec, count=3)}
    output = reference(model, batch)["y"]
    assume(output.size)
    cost = opened(model).cost(batch)
    assert cost.macs == output.size * spec.inputs * prod(spec.taps)
    assert opened(model).cost().macs == 0  # the file leaves the number of examples open


def kernel(*shape: int) -> np.ndarray:
    return np.ones(shape, F)


MACS: dict[str, tuple[list[onnx.NodeProto], int]] = {
    "matmul": ([helper.make_node("MatMul", ["x", "w"], ["y"])], 2 * 5 * 6 * 4),
    "both moving": ([helper.make_node("MatMul", ["x", "x2"], ["y"])], 2 * 5 * 6 * 7),
    "gemm": ([helper.make_node("Gemm", ["a", "w"], ["y"], transA=1)], 3 * 6 * 4),
    "transposed": ([helper.make_node("ConvTranspose", ["im", "k"], ["y"], strides=[2, 2], group=3)], 3 * 64 * 2 * 9),
    "two": (
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
        2 * 5 * (6 * 4 + 4 * 3),
    ),
}
INPUTS: dict[str, Any] = {"x": (F, [2, 5, 6]), "x2": (F, [2, 6, 7]), "a": (F, [6, 3]), "im": (F, [1, 3, 8, 8])}
TENSORS = {"w": kernel(6, 4), "v": kernel(4, 3), "k": kernel(3, 2, 3, 3)}


def with_nodes(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    used = {operand for node in nodes for operand in node.input}
    inputs = {name: given for name, given in INPUTS.items() if name in used}
    tensors = {name: entries for name, entries in TENSORS.items() if name in used}
    return assembled(nodes, inputs, (nodes[-1].output[0],), tensors)


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds_of_all_products(name: str, opened: Opened) -> None:
    nodes, macs = MACS[name]
    assert opened(with_nodes(nodes)).cost().macs == macs


def test_the_peak_follows_the_order_of_the_nodes(opened: Opened) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),  # 60 numbers in, 40 out
        helper.make_node("Relu", ["h"], ["r"]),  # 40 + 40
        helper.make_node("Concat", ["r", "r"], ["c"], axis=0),  # 40 + 80: the peak
        helper.make_node("ReduceSum", ["c"], ["y"]),
    ]
    assert opened(with_nodes(nodes)).cost().peak == 4 * 120


def test_an_input_that_is_read_late_lives_long(opened: Opened) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Concat", ["h", "h"], ["c"], axis=0),
        helper.make_node("MatMul", ["c", "v"], ["y"]),
        helper.make_node("Shape", ["x"], ["s"]),
    ]
    model = with_nodes(nodes[:3])
    assert opened(model).cost().peak == 4 * 140
    model.graph.node.append(nodes[3])
    model.graph.output.append(helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [3]))
    assert opened(model).cost().peak == 4 * (60 + 80 + 60)


def test_sizes_that_only_a_run_shows(opened: Opened) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Cast", ["where"], ["h"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "m"], ["y"]),
    ]
    tensors = {"m": kernel(2, 7)}
    program = opened(assembled(nodes, {"x": (F, ["n", 4])}, ("y",), tensors))
    assert (program.cost().macs, program.cost().peak) == (0, 0)
    assert program.cost({"x": np.eye(4, dtype=F)}).macs == 4 * 2 * 7


def test_what_cannot_be_known_costs_nothing(opened: Opened) -> None:
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"])],
        "t",
        [],
        [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=then)
    model = assembled([node], {"x": (F, [2, 6]), "flag": (np.bool_, [])}, (), {"w": kernel(6, 4)})
    model.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 4]))
    cost = opened(model).cost({"x": np.ones((2, 6), F), "flag": np.array(True)})
    assert (cost.params, cost.macs) == (24, 0)
    assert cost.peak == 4 * (12 + 8) + 1
    strange = with_nodes([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])])
    strange.opset_import.add(domain="nobody", version=1)
    strange.graph.node[1].domain = "nobody"
    cost = opened(strange).cost({"x": np.ones((2, 5, 6), F)})
    assert (cost.macs, cost.peak) == (2 * 5 * 6 * 4, 4 * (60 + 40))
    assert opened(strange).cost({"x": "no array"}).params == 24
