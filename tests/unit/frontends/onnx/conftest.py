"""Small models, one for every way to write ``y = x W^T`` in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tdc.frontends.onnx import OnnxProgram, load_model

OUT, IN, ROWS = 10, 6, 4


@dataclass
class Case:
    """One spelling: the model, the canonical weight, a batch, and what must come out."""

    proto: onnx.ModelProto
    weight: np.ndarray
    batch: dict[str, np.ndarray]
    activation: np.ndarray
    output: np.ndarray
    program: OnnxProgram
    path: Path


def make_model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[np.dtype, list[Any]]],
    outputs: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    opset: int = 20,
    version: int = 10,
) -> onnx.ModelProto:
    """A model; ``inputs`` name -> (dtype, shape), ``outputs`` name -> dtype."""

    def info(name: str, dtype: Any, shape: list[Any] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    graph = helper.make_graph(
        nodes,
        "graph",
        [info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
    model.producer_name = "somebody"
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for value in model.graph.output:  # the checker wants a shape for every output
        value.CopyFrom(shapes[value.name])
    return model


def _weight_source(text: str, weight: np.ndarray) -> tuple[str, list[onnx.NodeProto], dict[str, np.ndarray]]:
    """How the weight reaches its operator: an initializer, a Constant, or through Transpose and Identity."""
    if text == "initializer":
        return "w", [], {"w": weight}
    if text == "constant":
        node = helper.make_node("Constant", [], ["w"], name="weight", value=numpy_helper.from_array(weight, "value"))
        return "w", [node], {}
    if text == "transpose":
        return "wt", [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0])], {"w": weight.T.copy()}
    nodes = [
        helper.make_node("Identity", ["w"], ["w1"], name="id"),
        helper.make_node("Transpose", ["w1"], ["w2"], name="t1"),
        helper.make_node("Transpose", ["w2"], ["w3"], name="t2", perm=[1, 0]),
    ]
    return "w3", nodes, {"w": weight}


SPELLINGS = (
    *("right", "right-rank4", "right-vector", "left", "left-rank4", "left-vector"),
    *(f"gemm-{side}-{a}{b}" for side in ("right", "left") for a in (0, 1) for b in (0, 1)),
    *("gemm-scaled-right", "gemm-scaled-left", "gemm-fixed-bias", "gemm-moving-bias"),
)
SOURCES = ("initializer", "constant", "transpose", "chain")


def _matmul(kind: str, weight: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """(stored operand, operands with W for the weight, the batch's x, the output)."""
    if kind.startswith("right"):
        shape = {"right": (2, ROWS, IN), "right-rank4": (2, 1, ROWS, IN), "right-vector": (IN,)}[kind]
        entries = np.resize(x, shape)
        return weight.T, ["x", "W"], entries, entries @ weight.T
    shape = {"left": (2, IN, ROWS), "left-rank4": (2, 1, IN, ROWS), "left-vector": (IN,)}[kind]
    entries = np.resize(x, shape)
    return weight, ["W", "x"], entries, weight @ entries


def spell(kind: str, source: str, dtype: Any) -> tuple[onnx.ModelProto, np.ndarray, dict[str, np.ndarray], Any, Any]:
    """The model of one spelling, its canonical weight, batch, activation and output."""
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((OUT, IN)).astype(dtype)
    x = rng.standard_normal((2, ROWS, IN)).astype(dtype)
    tensors: dict[str, np.ndarray] = {}
    attributes: dict[str, Any] = {}
    op, extra = "MatMul", []
    if not kind.startswith("gemm"):
        operand, operands, entries, y = _matmul(kind, weight, x)
        activation = entries.swapaxes(-1, -2) if kind in ("left", "left-rank4") else entries
    else:
        op, rows = "Gemm", x[0]
        left = kind.startswith("gemm-left") or kind == "gemm-scaled-left"
        a, b = (int(c) for c in kind[-2:]) if kind[-1] in "01" else (0, 0)
        attributes = {"transA": a, "transB": b}
        weight_side, data_side = (weight, rows.T) if left else (weight.T, rows)
        first, second = (weight_side, data_side) if left else (data_side, weight_side)
        first, second = (first.T if a else first), (second.T if b else second)
        operand, entries = (first, second) if left else (second, first)
        operands, activation = (["W", "x"] if left else ["x", "W"]), rows
        y = weight_side @ data_side if left else data_side @ weight_side
        if kind.startswith("gemm-scaled") or kind.endswith("bias"):
            attributes |= {"alpha": 0.5, "beta": 2.0}
            bias = rng.standard_normal(y.shape[-1]).astype(dtype)
            y = 0.5 * y + 2.0 * bias
            extra = ["c"]
            tensors["c"] = bias
        elif a == b:
            bias = rng.standard_normal(y.shape[-1]).astype(dtype)
            y, extra = y + bias, ["c"]
            tensors["c"] = bias
    name, before, stored = _weight_source(source, np.ascontiguousarray(operand))
    used = [name if operand_name == "W" else operand_name for operand_name in operands]
    inputs = {"x": (np.dtype(dtype), [None] * entries.ndim)}
    batch = {"x": np.ascontiguousarray(entries)}
    if kind == "gemm-moving-bias":
        batch["c"] = tensors.pop("c")
        inputs["c"] = (np.dtype(dtype), [None])
    nodes = [*before, helper.make_node(op, [*used, *extra], ["y"], name="linear", **attributes)]
    nodes.append(helper.make_node("Relu" if kind == "right" else "Identity", ["y"], ["z"], name="after"))
    proto = make_model(nodes, inputs, {"y": dtype, "z": dtype}, {**tensors, **stored})
    return proto, weight, batch, activation, y


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[onnx.ModelProto], OnnxProgram]:
    """Store a model as a file and open it."""

    def open_it(proto: onnx.ModelProto) -> OnnxProgram:
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return OnnxProgram(load_model(path), path)

    return open_it


@pytest.fixture
def case(opened: Callable[[onnx.ModelProto], OnnxProgram], tmp_path: Path) -> Callable[..., Case]:
    """One spelling as an open program."""

    def make(kind: str, source: str = "initializer", dtype: Any = np.float32) -> Case:
        proto, weight, batch, activation, output = spell(kind, source, dtype)
        return Case(proto, weight, batch, activation, output, opened(proto), tmp_path / "model.onnx")

    return make


@pytest.fixture
def build() -> Callable[..., onnx.ModelProto]:
    """:func:`make_model`, for tests."""
    return make_model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``spelling`` and ``source`` run over all spellings of a use and all sources of its weight."""
    if "spelling" in metafunc.fixturenames:
        metafunc.parametrize("spelling", SPELLINGS)
    if "source" in metafunc.fixturenames:
        metafunc.parametrize("source", SOURCES)
