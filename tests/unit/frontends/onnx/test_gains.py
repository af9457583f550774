"""The gains of normalisations in front of linear sites."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tdc.frontends.onnx import OnnxProgram

from .convolutions import Spec, assembled, model_of

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.float32
GAMMA = np.arange(1, 7, dtype=F)

BEFORE: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "layer norm": ([helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["h"])], True),
    "cast": (
        [
            helper.make_node("LayerNormalization", ["x", "gamma"], ["n"]),
            helper.make_node("Cast", ["n"], ["h"], to=TensorProto.FLOAT),
        ],
        True,
    ),
    "mul": ([helper.make_node("Mul", ["gamma", "x"], ["h"])], True),
    "old layer norm": (
        [
            helper.make_node("Div", ["x", "x2"], ["d"]),
            helper.make_node("Mul", ["d", "gamma"], ["m"]),
            helper.make_node("Add", ["m", "beta"], ["h"]),
        ],
        True,
    ),
    "scaled and moved": (
        [helper.make_node("Mul", ["x", "gamma"], ["m"]), helper.make_node("Add", ["m", "beta"], ["h"])],
        False,
    ),
    "moving gain": ([helper.make_node("Mul", ["x", "x2"], ["h"])], False),
    "scalar": ([helper.make_node("Mul", ["x", "one"], ["h"])], False),
    "activation": ([helper.make_node("Mul", ["x", "gamma"], ["m"]), helper.make_node("Relu", ["m"], ["h"])], False),
    "nothing": ([helper.make_node("Relu", ["x"], ["h"])], False),
}


@pytest.mark.parametrize("name", BEFORE)
def test_gains(name: str, opened: Opened) -> None:
    nodes, found = BEFORE[name]
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(F)
    tensors = {"w": weight, "gamma": GAMMA, "beta": GAMMA + 1, "one": np.ones(1, F)}
    nodes = [*nodes, helper.make_node("MatMul", ["h", "w"], ["y"])]
    used = {operand for node in nodes for operand in node.input}
    stored = {key: entries for key, entries in tensors.items() if key in used}
    inputs = {key: (F, [3, 6]) for key in ("x", "x2") if key in used}
    program = opened(assembled(nodes, inputs, ("y",), stored, opset=20))
    (site,), _ = program.sites()
    gain = program.gain(site)
    assert (gain is not None) == found
    assert gain is None or np.array_equal(gain.numpy(), GAMMA)


def test_convolutions_have_no_gain(opened: Opened) -> None:
    program = opened(model_of(Spec()))
    assert program.gain(program.sites()[0][0]) is None
