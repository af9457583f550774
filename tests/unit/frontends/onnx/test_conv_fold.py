"""Which convolutions leave the order of their outputs to the next one, and what then happens between the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import Change, Replacement
from tdc.ir.block import without_gather

from .convolutions import assembled, lowered, rebuilt, relative, runtime

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.float32

PASSING: dict[str, list[Any]] = {
    "nothing": [],
    "relu": [("Relu", [], {})],
    "pools": [("MaxPool", [], {"kernel_shape": [2, 2]}), ("AveragePool", [], {"kernel_shape": [2, 2]})],
    "global": [("GlobalAveragePool", [], {})],
    "padded": [("Pad", ["pads"], {})],
    "resized": [("Resize", ["", "scales"], {"mode": "nearest"})],
    "sized": [("Resize", ["", "", "sizes"], {"mode": "linear"})],
    "mean": [("ReduceMean", [], {"axes": [2, 3]})],
    "gated": [("HardSigmoid", [], {}), ("Mul", ["h"], {})],
    "bias": [("Add", ["vector"], {}), ("Clip", ["low", "high"], {})],
}
STOPPING: dict[str, list[Any]] = {
    "scale": [("Mul", ["vector"], {})],
    "late bias": [("Relu", [], {}), ("Add", ["vector"], {})],
    "channel pad": [("Pad", ["pads1"], {}), ("Slice", ["zero", "six", "one"], {})],
    "channel size": [("Resize", ["", "", "wide"], {"mode": "linear"}), ("Slice", ["zero", "six", "one"], {})],
    "mean of channels": [("ReduceMean", [], {"axes": [1, 2]}), ("Add", ["h"], {})],
    "transpose": [("Transpose", [], {"perm": [0, 1, 3, 2]})],
    "softmax": [("Softmax", [], {"axis": 1})],
}
CONSTANTS = {
    "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2]),
    "pads1": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "scales": np.array([1, 1, 2, 2], F),
    "sizes": np.array([2, 6, 5, 7]),
    "wide": np.array([2, 7, 5, 7]),
    "vector": np.random.default_rng(3).standard_normal((6, 1, 1)).astype(F),
    "low": np.array(-0.5, F),
    "high": np.array(0.5, F),
    "zero": np.array([0]),
    "six": np.array([6]),
    "one": np.array([1]),
}


def chain(steps: list[Any], bias: bool, groups: tuple[int, int] = (1, 1)) -> onnx.ModelProto:
    """Convolution, ``steps``, convolution."""
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((6, 6 // groups[0], 3, 3)).astype(F), "b": rng.standard_normal(6).astype(F)}
    tensors["v"] = rng.standard_normal((4, 6 // groups[1], 1, 1)).astype(F)
    nodes = [helper.make_node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["h"], group=groups[0], pads=[1] * 4)]
    last = "h"
    for k, (op, others, attributes) in enumerate(steps):
        nodes.append(helper.make_node(op, [last, *others], [f"h{k}"], **attributes))
        last = f"h{k}"
    nodes.append(helper.make_node("Conv", [last, "v"], ["y"], group=groups[1]))
    used = {operand for node in nodes for operand in node.input}
    stored = {name: entries for name, entries in (CONSTANTS | tensors).items() if name in used}
    return assembled(nodes, {"x": (F, ["n", 6, 8, 8])}, ("y",), stored)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", PASSING)
def test_an_order_passes_to_the_next_convolution(name: str, bias: bool, shifted: bool, opened: Opened) -> None:
    model = chain(PASSING[name], bias)
    program = opened(model)
    (first, second), _ = program.sites()
    assert first.pointwise_consumer == 1
    batch = {"x": np.random.default_rng(1).standard_normal((2, 6, 8, 8)).astype(F)}
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64) if shifted and first.bias else None
    new = lowered(first, program.weight(first), "pivoted/channels_out", {"r": 4})
    dense = rebuilt(first, program.weight(first))
    wanted = program.outputs(batch, {0: Change(dense, shift)})["y"].numpy()
    order = torch.argsort(new.factors["place"].long())
    block = without_gather(new.block)
    factors = {key: new.factors[key] for key, _ in block.factors}
    program.replace(first, Replacement(block, factors, "pivoted", order, shift))
    reader = lowered(second, program.weight(second)[:, order], "output_svd")
    program.replace(second, reader)
    model = program.finish()
    assert "Gather" not in [node.op_type for node in model.graph]
    assert relative(runtime(model, batch)["y"], wanted) < 1e-5


@pytest.mark.parametrize("name", STOPPING)
def test_an_order_does_not_pass(name: str, opened: Opened) -> None:
    assert [site.pointwise_consumer for site in opened(chain(STOPPING[name], True)).sites()[0]] == [None, None]


@pytest.mark.parametrize("groups", [(2, 1), (1, 2), (6, 1)])
def test_an_order_does_not_pass_groups(groups: tuple[int, int], opened: Opened) -> None:
    assert opened(chain([], True, groups)).sites()[0][0].pointwise_consumer is None


def test_an_order_does_not_pass_from_convolution_to_product(opened: Opened) -> None:
    weight, matrix = np.ones((6, 3, 1, 1), F), np.random.default_rng(0).standard_normal((8, 5)).astype(F)
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "m"], ["y"])]
    program = opened(assembled(nodes, {"x": (F, [1, 3, 8, 8])}, ("y",), {"w": weight, "m": matrix}))
    assert [site.pointwise_consumer for site in program.sites()[0]] == [None, None]
