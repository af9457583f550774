"""Convolutions as sites: their axes, windows, weights and biases, and why others are passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import sketch
from tdc.ir import OpKind, Site

from .convolutions import Spec, arrays, assembled, example, model_of, reference, specs

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.float32
UNTIL_DONE = settings(suppress_health_check=list(HealthCheck), max_examples=60)


def only(program: OnnxProgram) -> Site:
    (site,), remarks = program.sites()
    assert remarks == ()
    return site


def folded(spec: Spec) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight and the bias by their definition, in float64; None without a bias."""
    given = arrays(spec, F)
    tensors = {name: entries.astype(np.float64) for name, entries in given.items()}
    parts = spec.bias.split()
    bias = np.zeros(len(tensors["b"])) + ("conv" in parts) * tensors["b"] + ("add" in parts) * tensors["a"].reshape(-1)
    if "norm" not in parts:
        return tensors["w"], None if not parts else tensors["b"] if "conv" in parts else bias
    single = given["gamma"] / np.sqrt(given["variance"] + np.float32(1e-3))  # in float32, as exporters fold
    scale = single.astype(np.float64)
    weight = tensors["w"] * scale.reshape(-1, *[1] * (tensors["w"].ndim - 1))
    return weight, tensors["beta"] + (bias - tensors["mean"]) * scale


@UNTIL_DONE
@given(spec=specs())
def test_weight_bias_and_axes_of_every_spelling(spec: Spec, opened: Opened) -> None:
    program = opened(model_of(spec))
    site = only(program)
    weight, bias = folded(spec)
    sizes = {"g": spec.groups, "o": spec.outputs, "i": spec.inputs}
    assert dict(site.sizes) == sizes | dict(zip("pqz", spec.taps, strict=False))
    assert site.kind is (OpKind.CONV1D, OpKind.CONV2D, OpKind.CONV3D)[len(spec.taps) - 1]
    assert (site.uses, site.names, site.bias) == (1, ("w",), bias is not None)
    assert site.norm == ("norm" if "norm" in spec.bias else "")
    stored = program.weight(site)
    assert np.array_equal(stored.numpy(), weight.astype(F))
    assert site.sketch == sketch(stored)
    exact = program._matches[0].uses[0].bias
    assert (exact is None) == (bias is None)
    assert exact is None or np.allclose(exact, bias, rtol=1e-12)


@UNTIL_DONE
@given(spec=specs())
def test_windows_count_the_positions_of_the_output(spec: Spec, opened: Opened) -> None:
    model = model_of(spec)
    shape = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    assume(min(shape[2:]) > 0)
    site = only(opened(model))
    assert [window.positions(spec.length + k) for k, window in enumerate(site.windows)] == shape[2:]
    lengths = [(axis, spec.length + k, size) for k, (axis, size) in enumerate(zip("pqz", shape[2:], strict=False))]
    assert site.lengths == tuple(lengths)


@pytest.mark.parametrize(
    ("taps", "dilation", "auto", "padding"),
    [
        (3, 1, "SAME_UPPER", "1:1"),
        (4, 1, "SAME_UPPER", "1:2"),
        (4, 1, "SAME_LOWER", "2:1"),
        (2, 3, "SAME_LOWER", "2:1"),
        (1, 1, "SAME_LOWER", "0:0"),
        (4, 2, "SAME_UPPER", "3:3"),
    ],
)
def test_same_padding_with_stride_1_is_explicit(
    taps: int, dilation: int, auto: str, padding: str, opened: Opened
) -> None:
    spec = Spec((taps,), dilations=(dilation,), auto=auto)
    assert dict(only(opened(model_of(spec))).attributes)["padding"] == padding


def test_same_padding_with_strides_depends_on_the_input(opened: Opened) -> None:
    spec = Spec((3, 4), strides=(2, 1), auto="SAME_LOWER")
    site = only(opened(model_of(spec)))
    assert site.attributes == (("stride", "2 1"), ("dilation", "1 1"), ("padding", "lower 2:1"))


def test_attributes_may_be_absent_and_sizes_unknown(opened: Opened) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(F)
    model = assembled([node], {"x": (F, ["n", 3, "h", "w"])}, ("y",), {"w": weight})
    site = only(opened(model))
    assert site.attributes == (("stride", "1 1"), ("dilation", "1 1"), ("padding", "0:0 0:0"))
    assert (site.lengths, site.bias, site.norm, site.layout) == ((), False, "", "")


@pytest.mark.parametrize("channels", [(1, 4), (4, 1), (1, 1)])
def test_thin_convolutions_are_left_to_the_passes(channels: tuple[int, int], opened: Opened) -> None:
    outputs, inputs = channels
    assert only(opened(model_of(Spec(outputs=outputs, inputs=inputs)))).matrix == (1, outputs, inputs * 9)


@pytest.mark.parametrize("twin", ["shared", "equal", "identity"])
def test_tied_convolutions_are_one_site(twin: str, opened: Opened) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(F)
    other = {"shared": "w", "equal": "w2", "identity": "w3"}[twin]
    nodes = [
        helper.make_node("Identity", ["w"], ["w3"]),
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", other], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = {"w": weight, "w2": weight.copy(), "b": np.ones(3, F)}
    if twin != "equal":
        del tensors["w2"]
    site = only(opened(assembled(nodes, {"x": (F, ["n", 3, 8, 8])}, ("y",), tensors)))
    assert (site.uses, site.bias, site.lengths) == (2, False, (("p", 8, 8), ("q", 8, 8)))


def linear(op: str, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], name="node", **attributes)


def kernel(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(F)


PASSED_OVER: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, str]]] = {
    "tied apart": (
        [
            helper.make_node("Conv", ["im", "w"], ["h"], pads=[1, 1, 1, 1]),
            linear("Conv", ["h", "w"], pads=[1, 1, 0, 0]),
        ],
        {"w": kernel(3, 3, 3, 3)},
        {"w": "its 2 convolutions differ in strides, dilations, padding or groups"},
    ),
    "read elsewhere": (
        [
            helper.make_node("Conv", ["im", "w"], ["h"]),
            helper.make_node("ReduceSum", ["w"], ["s"]),
            linear("Add", ["h", "s"]),
        ],
        {"w": kernel(4, 3, 1, 1)},
        {"w": "ReduceSum: not handled; its 1 linear use(s) stay dense with it"},
    ),
    "constant image": (
        [linear("Conv", ["w", "v"])],
        {"w": kernel(1, 3, 8, 8), "v": kernel(4, 3, 1, 1)},
        {"w": "Conv: only its second input is a weight", "v": "Conv: both operands are constant"},
    ),
    "moving weight": (
        [linear("Conv", ["w", "im"])],
        {"w": kernel(1, 3, 9, 9)},
        {"w": "Conv: only its second input is a weight"},
    ),
    "transposed": (
        [linear("ConvTranspose", ["im", "w"])],
        {"w": kernel(3, 2, 2, 2)},
        {"w": "ConvTranspose: not handled"},
    ),
    "nan": (
        [linear("Conv", ["im", "w"])],
        {"w": np.full((2, 3, 1, 1), np.nan, F)},
        {"w": "6 of 6 entries of the weight are NaN or infinite"},
    ),
    "quantised": (
        [helper.make_node("DequantizeLinear", ["w", "s"], ["v"]), linear("Conv", ["im", "v"])],
        {"w": np.ones((2, 3, 1, 1), np.int8), "s": np.array(0.1, F)},
        {"w": "DequantizeLinear: the weight is quantised (int8)"},
    ),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_is_passed_over_says_why(name: str, opened: Opened) -> None:
    nodes, tensors, expected = PASSED_OVER[name]
    program = opened(assembled(nodes, {"im": (F, [2, 3, 8, 8])}, ("y",), tensors))
    sites, remarks = program.sites()
    assert sites == ()
    assert {remark.site: remark.reason for remark in remarks} == expected


def test_negative_padding_is_passed_over(opened: Opened) -> None:
    node = linear("Conv", ["im", "w"], pads=[0, 0, 0, 0])
    program = opened(assembled([node], {"im": (F, [2, 3, 8, 8])}, ("y",), {"w": kernel(2, 3, 1, 1)}))
    program.model.graph[0].attributes["pads"] = ir.AttrInt64s("pads", [-1, 0, 0, 0])
    assert [remark.reason for remark in program.sites()[1]] == ["Conv: negative padding [-1, 0, 0, 0]"]


NORM = ["gamma", "beta", "mean", "variance"]


def normed(nodes: list[onnx.NodeProto], width: int = 4, **tensors: np.ndarray) -> tuple[Any, ...]:
    made = {name: np.full(width, 1.0 + k, F) for k, name in enumerate(NORM)}
    return nodes, made | tensors


def norm(value: str, out: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", [value, *NORM], [out], name="norm", **attributes)


UNFOLDED: dict[str, list[onnx.NodeProto]] = {
    "read twice": [linear("Conv", ["im", "w"]), norm("y", "n"), helper.make_node("Add", ["n", "y"], ["z"])],
    "activation between": [
        helper.make_node("Conv", ["im", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        norm("r", "z"),
    ],
    "moving mean": [
        helper.make_node("Conv", ["im", "w"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["m"], axes=[0, 2, 3], keepdims=0),
        helper.make_node("BatchNormalization", ["h", "gamma", "beta", "m", "variance"], ["z"]),
    ],
    "moving bias": [
        helper.make_node("ReduceMean", ["im4"], ["m"], axes=[0, 2, 3], keepdims=0),
        helper.make_node("Conv", ["im", "w", "m"], ["h"]),
        norm("h", "z"),
    ],
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_a_norm_that_is_not_folded(name: str, opened: Opened) -> None:
    nodes, tensors = normed(UNFOLDED[name], w=kernel(4, 3, 1, 1))
    inputs = {"im": (F, [2, 3, 8, 8]), "im4": (F, [2, 4, 8, 8])}
    site = only(opened(assembled(nodes, inputs, ("z",), tensors)))
    assert (site.norm, site.bias) == ("", False)


@pytest.mark.parametrize(("op", "rank", "folds"), [("MatMul", 2, True), ("Gemm", 2, True), ("MatMul", 3, False)])
def test_a_norm_behind_a_linear_site(op: str, rank: int, folds: bool, opened: Opened) -> None:
    inputs = ["x", "w", "b"] if op == "Gemm" else ["x", "w"]
    attributes = {"alpha": 0.5, "beta": 3.0} if op == "Gemm" else {}
    nodes = [helper.make_node(op, inputs, ["h"], **attributes), norm("h")]
    nodes, tensors = normed(nodes, w=kernel(6, 4), b=np.arange(4, dtype=F))
    tensors = tensors if op == "Gemm" else {name: entries for name, entries in tensors.items() if name != "b"}
    x = kernel(5, 4, 6) if rank == 3 else kernel(5, 6)
    model = assembled(nodes, {"x": (F, list(x.shape))}, ("y",), tensors)
    program = opened(model)
    site = only(program)
    assert (site.norm, site.bias) == (("norm", True) if folds else ("", False))
    assert np.allclose(program.outputs({"x": x}, {})["y"], reference(model, {"x": x})["y"], rtol=1e-5, atol=1e-5)
    scale = 1 / np.sqrt(4 + 1e-5) if folds else 1.0
    assert np.allclose(program.weight(site), kernel(6, 4).T * scale)


BIASED: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "matmul": ([linear("MatMul", ["x", "w"])], False),
    "matmul add": ([helper.make_node("MatMul", ["x", "w"], ["h"]), linear("Add", ["b", "h"])], True),
    "matmul scalar": ([helper.make_node("MatMul", ["x", "w"], ["h"]), linear("Add", ["h", "one"])], False),
    "gemm": ([linear("Gemm", ["x", "w", "b"])], True),
    "gemm none": ([linear("Gemm", ["x", "w"])], False),
    "gemm matrix": ([linear("Gemm", ["x", "w", "table"])], False),
    "gemm left": ([linear("Gemm", ["wl", "x", "b5"], transA=1, transB=1)], False),
    "left": ([helper.make_node("MatMul", ["wo", "x5"], ["h"]), linear("Add", ["h", "b"])], False),
    "read twice": (
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "b"], ["k"]),
            linear("Add", ["h", "k"]),
        ],
        False,
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_which_linear_sites_have_a_bias(name: str, opened: Opened) -> None:
    nodes, biased = BIASED[name]
    tensors = {"w": kernel(6, 4), "b": kernel(4), "one": kernel(1), "table": kernel(5, 4), "wl": kernel(6, 4)}
    tensors |= {"b5": kernel(5), "wo": kernel(3, 6)}
    used = {operand for node in nodes for operand in node.input}
    tensors = {key: entries for key, entries in tensors.items() if key in used}
    inputs = {"x": (F, [5, 6]), "x5": (F, [6, 4])}
    (site,), _ = opened(assembled(nodes, inputs, ("y",), tensors)).sites()
    assert site.bias == biased


def test_exported_zeros_in_place_of_a_bias_are_none(opened: Opened) -> None:
    zero = numpy_helper.from_array(np.zeros((), F), "value")
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("CastLike", ["zero", "x"], ["same"]),
        helper.make_node("Shape", ["w"], ["shape"], start=0, end=1),
        helper.make_node("Expand", ["same", "shape"], ["bias"]),
        linear("Conv", ["x", "w", "bias"]),
    ]
    site = only(opened(assembled(nodes, {"x": (F, [2, 3, 8, 8])}, ("y",), {"w": kernel(4, 3, 2, 2)})))
    assert not site.bias


def test_names_of_convolutions(opened: Opened) -> None:
    model = model_of(Spec())
    for node in model.graph.node:
        node.input[:] = ["onnx::Conv_7" if name == "w" else name for name in node.input]
    model.graph.initializer[0].name = "onnx::Conv_7"
    model.graph.node[0].name = "/features/features.3/conv/Conv"
    assert only(opened(model)).names == ("features.3.conv.weight", "onnx::Conv_7")
    notes = {
        "pkg.torch.onnx.name_scopes": "['', 'f', 'f.0', 'conv2d']",
        "pkg.torch.onnx.class_hierarchy": "['M', 'S', 'torch.nn.modules.conv.Conv2d', 'aten.conv2d.default']",
    }
    for key, value in notes.items():
        model.graph.node[0].metadata_props.add(key=key, value=value)
    assert only(opened(model)).name == "f.0.weight"


@UNTIL_DONE
@given(spec=specs(), count=st.integers(1, 3))
def test_taps_show_the_input_before_padding(spec: Spec, count: int, opened: Opened) -> None:
    assume("SAME" not in spec.auto or max(spec.dilations) == 1)  # onnxruntime does not run it
    program, seen = opened(model_of(spec)), []
    x = example(spec, count=count)
    program.observe({"x": x}, program.sites()[0], lambda site, activation: seen.append((site.order, activation)))
    ((order, activation),) = seen
    assert order == 0
    assert torch.equal(activation, torch.from_numpy(x))
