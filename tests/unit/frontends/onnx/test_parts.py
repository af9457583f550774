"""Runs of a file in parts: what enters the sites in the dense model and in one that changes on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import Change
from tdc.ir import Site

Opened = Callable[[onnx.ModelProto], OnnxProgram]
JOINS = {
    "sum": ("y = Add(a, c)", "a"),
    "other way round": ("y = Add(c, a)", "a"),
    "behind a bias": ("d = Add(bias, c) e = Identity(d) y = Add(e, a)", "a"),
    "behind a reshape": ("d = Reshape(c, back) e = Reshape(a, back) f = Add(e, d) y = Reshape(f, flat)", None),
    "the input": ("d = Reshape(c, flat) y = Add(x, d)", "x"),
    "made later": ("d = Cos(a) y = Add(c, d)", None),
    "made before": ("y = Add(c, g)", "g"),
    "scaled": ("d = Mul(c, half) y = Add(d, a)", None),
    "used twice": ("d = Add(c, a) y = Mul(d, c)", None),
    "to itself": ("y = Add(c, c)", None),
    "a bias alone": ("y = Add(c, bias)", None),
    "an output": ("y = Identity(c)", None),
    "in a branch": (
        """d = If(flag) <then_branch = yes () => (float[n, 6] s) { s = Add(a, c) },
           else_branch = no () => (float[n, 6] t) { t = Sub(a, c) }> y = Identity(d)""",
        None,
    ),
}


def file_of(join: str) -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["" : 17]> chain (float[n, 6] x, bool flag) => (float[n, 6] y) {{
        h = MatMul(x, w0) a = Sin(h) g = Neg(a) u = Tanh(a) k = Constant<value = float {{1.0}}>() v = Mul(u, k)
        b = Gemm(v, w1, bias) c = MatMul(b, w2) {join} }}"""
    return _with_tensors(text, {name: _random(6, 6, seed) for seed, name in enumerate(("w0", "w1", "w2"))})


def _with_tensors(text: str, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    tensors |= {"bias": _random(1, 6, 9)[0], "half": np.float32(0.5)}
    tensors |= {"back": np.array([2, -1, 6]), "flat": np.array([-1, 6])}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items())
    return model


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def met(program: OnnxProgram, data: list[Any], sites: Any, change: Change | None) -> list[tuple[int, Any, Any]]:
    found: list[tuple[int, Any, Any]] = []

    def visit(site: Site, activations: Any, beside: Any) -> Change | None:
        found.append((site.order, [a.clone() for a in activations], [None if b is None else b.clone() for b in beside]))
        return change if site.order == 0 else None

    assert program.lockstep(data, sites, visit) == ""
    return found


@pytest.mark.parametrize("case", JOINS)
def test_activations_and_what_outputs_are_added_to(case: str, opened: Opened) -> None:
    join, beside = JOINS[case]
    program = opened(file_of(join))
    data = [{"x": _random(4, 6, 20 + k), "flag": np.array(True)} for k in range(2)]
    new = torch.from_numpy(_random(6, 6, 30))
    found = met(program, list(program.batches(data)), program.sites()[0], Change(new, None))
    assert [order for order, *_ in found] == [0, 1, 2]
    weights = [program.weight(site) for site in program.sites()[0]]
    bias = torch.from_numpy(_random(1, 6, 9)[0])

    def run(x: Tensor, first: Tensor) -> dict[str, Tensor]:
        a = (x @ first.T).sin()
        b = a.tanh() @ weights[1].T + bias
        return {"x": x, "a": a, "g": -a, "v": a.tanh(), "b": b}

    xs = [torch.from_numpy(batch["x"]) for batch in data]
    runs = [run(x, weights[0]) for x in xs] + [run(x, new) for x in xs]
    for place, name in enumerate(("x", "v", "b")):
        for given, values in zip(found[place][1], runs, strict=True):
            assert torch.allclose(given, values[name], atol=1e-5)
    assert found[0][2] == found[1][2] == [None] * 4
    if beside is None:
        assert found[2][2] == [None] * 4
    else:
        assert all(torch.allclose(b, values[beside], atol=1e-5) for b, values in zip(found[2][2], runs, strict=True))


def test_convolutions_with_a_pad_and_a_folded_normalisation(opened: Opened) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] y) {
        p = Pad(x, pads) c = Conv(p, w0) d = BatchNormalization(c, bias, bias, bias, variance) a = Relu(d)
        e = Conv<pads = [1, 1, 1, 1]>(a, w1) f = BatchNormalization(e, bias, bias, bias, variance) y = Add(a, f) }"""
    tensors = {name: _random(16, 9, k).reshape(4, 4, 3, 3) for k, name in enumerate(("w0", "w1"))}
    tensors |= {"bias": _random(1, 4, 9)[0], "variance": np.full(4, 2, np.float32), "pads": np.int64([0, 0, 1, 1] * 2)}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in tensors.items())
    for node in model.graph.node[:2]:  # torch's exporter says that a Pad and a Conv come from one module so
        for key, value in (
            ("class_hierarchy", "['Net', 'nn.Conv2d', 'conv']"),
            ("name_scopes", "['', 'conv', 'conv']"),
        ):
            node.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
    program = opened(model)
    x = _random(50, 4, 5).reshape(2, 4, 5, 5)
    weight = torch.from_numpy(tensors["w0"])
    shift = torch.ones(4)
    found = met(program, [{"x": x}], program.sites()[0], Change(torch.zeros_like(weight), shift))
    assert [tuple(a.shape) for _, activations, _ in found for a in activations] == [(2, 4, 5, 5)] * 4
    assert np.array_equal(found[0][1][0].numpy(), x)
    assert found[0][2] == [None, None]
    scale = torch.from_numpy(tensors["bias"]) / (2 + 1e-5) ** 0.5
    convolved = torch.nn.functional.conv2d(torch.from_numpy(x), weight, padding=1)
    mean = torch.from_numpy(tensors["bias"]).reshape(4, 1, 1)
    dense = torch.relu((convolved - mean) * scale.reshape(4, 1, 1) + mean)
    bias = torch.from_numpy(tensors["bias"]) * (1 - scale) + shift
    cut = torch.relu(bias).reshape(1, 4, 1, 1).expand(2, 4, 5, 5)
    for given, beside, wanted in zip(found[1][1], found[1][2], (dense, cut), strict=True):
        assert torch.allclose(given, wanted, atol=1e-5)
        assert torch.allclose(beside, wanted, atol=1e-5)


def test_a_weight_that_is_read_twice_changes_at_both(opened: Opened) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 6] x) => (float[n, 6] y) {
        a = MatMul(x, w0) b = Tanh(a) c = MatMul(b, w0) d = Sin(c) y = MatMul(d, w1) }"""
    program = opened(_with_tensors(text, {"w0": _random(6, 6, 0), "w1": _random(6, 6, 1)}))
    x = _random(3, 6, 2)
    found = met(program, [{"x": x}], program.sites()[0], Change(torch.eye(6), None))
    assert [order for order, *_ in found] == [0, 0, 1]
    assert np.allclose(found[2][1][1].numpy(), np.sin(np.tanh(x)), atol=1e-6)


def test_values_that_are_no_tensors_are_a_reason(opened: Opened) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 6] x) => (float[n, 6] y) {
        s = SequenceConstruct(x, x) a = MatMul(x, w0) c = SequenceAt(s, k) d = Add(a, c) y = MatMul(d, w1) }"""
    tensors = {"w0": _random(6, 6, 0), "w1": _random(6, 6, 1), "k": np.int64(1)}
    program = opened(_with_tensors(text, tensors))
    data = [{"x": _random(3, 6, 2)}]
    assert "s is no tensor" in program.lockstep(data, program.sites()[0], lambda *_: None)


def test_it_goes_no_further_than_the_last_site(opened: Opened) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 6] x) => (float[m, 6] y) {
        a = MatMul(x, w0) b = MatMul(a, w1) y = Gather(b, far) }"""
    program = opened(_with_tensors(text, {"w0": _random(6, 6, 0), "w1": _random(6, 6, 1), "far": np.array([999])}))
    first, second = program.sites()[0]
    data = [{"x": _random(3, 6, 2)}]
    assert len(met(program, data, [first, second], None)) == 2
    assert len(met(program, data, [first], None)) == 1
