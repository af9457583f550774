"""Which weights become sites, under which names, and why others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import sketch

Opened = Callable[[onnx.ModelProto], OnnxProgram]
Build = Callable[..., onnx.ModelProto]
F = np.dtype("float32")


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(F)


def reasons(program: OnnxProgram) -> dict[str, str]:
    return {remark.site: remark.reason for remark in program.sites()[1]}


def test_every_spelling_gives_the_canonical_weight(spelling: str, source: str, case: Callable[..., Any]) -> None:
    made = case(spelling, source)
    (site,), remarks = made.program.sites()
    assert remarks == ()
    assert dict(site.sizes) == {"o": 10, "i": 6}
    assert (site.dtype, site.order, site.uses, site.names) == ("float32", 0, 1, ("w",))
    weight = made.program.weight(site)
    assert weight.is_contiguous()
    assert weight.numpy().tobytes() == made.weight.tobytes()
    assert site.sketch == sketch(torch.from_numpy(made.weight))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions(dtype: Any, case: Callable[..., Any]) -> None:
    made = case("right", dtype=dtype)
    (site,), _ = made.program.sites()
    assert site.dtype == np.dtype(dtype).name
    assert made.program.weight(site).numpy().tobytes() == made.weight.tobytes()


def test_bfloat16_weight_keeps_its_bits(build: Build, opened: Opened) -> None:
    weight = torch.randn(5, 4).bfloat16()
    raw = weight.T.contiguous().view(torch.uint16).numpy().tobytes()
    proto = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {}, {}, {})
    proto.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[4, 5], raw_data=raw))
    proto.graph.input.append(helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["b", 4]))
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["b", 5]))
    program = opened(proto)
    (site,), _ = program.sites()
    assert site.dtype == "bfloat16"
    assert torch.equal(program.weight(site), weight)


@pytest.mark.parametrize("twin", ["shared", "equal", "transposed"])
def test_tied_weights_are_one_site(twin: str, build: Build, opened: Opened) -> None:
    w = matrix(6, 6)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"])]
    tensors = {"w": w}
    if twin == "transposed":
        nodes.append(helper.make_node("Gemm", ["h", "w2"], ["y"], transB=1))
        tensors["w2"] = w.T.copy()
    else:
        nodes.append(helper.make_node("MatMul", ["h", "w" if twin == "shared" else "w2"], ["y"]))
        tensors |= {} if twin == "shared" else {"w2": w.copy()}
    program = opened(build(nodes, {"x": (F, ["b", 6])}, {"y": F}, tensors))
    (site,), remarks = program.sites()
    assert remarks == ()
    assert site.uses == 2
    assert site.names == (("w",) if twin == "shared" else ("w", "w2"))
    assert np.array_equal(program.weight(site).numpy(), w.T)


def test_a_weight_used_as_it_is_and_transposed_is_passed_over(build: Build, opened: Opened) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)]
    program = opened(build(nodes, {"x": (F, ["b", 6])}, {"y": F}, {"w": matrix(6, 6)}))
    assert program.sites()[0] == ()
    assert reasons(program) == {"w": "used both as it is and transposed"}


@pytest.mark.parametrize("twin", ["shared", "transposed"])
def test_a_head_tied_to_an_embedding_is_passed_over(twin: str, build: Build, opened: Opened) -> None:
    table = matrix(12, 5)
    head = "t" if twin == "shared" else "head"
    nodes = [helper.make_node("Gather", ["table", "ids"], ["h"])]
    tensors = {"table": table}
    if twin == "shared":
        nodes.append(helper.make_node("Transpose", ["table"], ["t"]))
    else:
        tensors["head"] = table.T.copy()
    nodes.append(helper.make_node("MatMul", ["h", head], ["y"]))
    program = opened(build(nodes, {"ids": (np.dtype("int64"), ["b"])}, {"y": F}, tensors))
    assert program.sites()[0] == ()
    ((_, reason),) = reasons(program).items()
    assert reason == "Gather: embeddings are not decomposed; its 1 linear use(s) stay dense with it"


def test_equal_diagonals_are_not_enough_to_tie(build: Build, opened: Opened) -> None:
    first, second = matrix(6, 6), matrix(6, 6, 1)
    np.fill_diagonal(second, first.diagonal())
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    program = opened(build(nodes, {"x": (F, ["n", 6])}, {"y": F}, {"a": first, "b": second}))
    assert [site.name for site in program.sites()[0]] == ["a", "b"]


def test_a_weight_that_the_caller_may_override_is_passed_over(build: Build, opened: Opened) -> None:
    inputs = {"x": (F, ["b", 6]), "w": (F, [6, 4])}
    program = opened(build([helper.make_node("MatMul", ["x", "w"], ["y"])], inputs, {"y": F}, {"w": matrix(6, 4)}))
    assert program.sites()[0] == ()
    assert reasons(program) == {"w": "the caller may override it: it is a graph input"}


def test_before_ir_version_4_forced_inputs_are_constants(build: Build, opened: Opened) -> None:
    inputs = {"x": (F, ["b", 6]), "w": (F, [6, 4])}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    program = opened(build([node], inputs, {"y": F}, {"w": matrix(6, 4)}, opset=8, version=3))
    sites, (remark,) = program.sites()
    assert [site.name for site in sites] == ["w"]
    assert "IR version 3" in remark.reason
    assert [value.name for value in program.model.graph.inputs] == ["x"]


def linear(op: str, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], name="node", **attributes)


def graph_of(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray]) -> onnx.GraphProto:
    out = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    return helper.make_graph(nodes, "body", [], out, [numpy_helper.from_array(a, n) for n, a in tensors.items()])


PASSED_OVER: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, str]]] = {
    "conv": (
        [linear("ConvTranspose", ["im", "w"])],
        {"w": np.ones((2, 3, 1, 1), F)},
        {"w": "ConvTranspose: not handled"},
    ),
    "stacked": (
        [linear("MatMul", ["x", "w"])],
        {"w": np.ones((2, 6, 3), F)},
        {"w": "MatMul: the weight has rank 3, not 2"},
    ),
    "bias": ([linear("Add", ["x", "w"])], {"w": np.ones((5, 6), F)}, {"w": "Add: not handled"}),
    "mask": ([linear("Add", ["x", "w"])], {"w": np.ones((1, 6), F)}, {}),
    "cast": (
        [helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), linear("MatMul", ["x", "v"])],
        {"w": np.ones((6, 3), np.float16)},
        {"w": "Cast: the weight is used in another precision"},
    ),
    "two": (
        [helper.make_node("MatMul", ["v", "w"], ["u"]), linear("MatMul", ["x", "u"])],
        {"v": matrix(6, 5), "w": matrix(5, 4)},
        {"v": "MatMul: both operands are constant", "w": "MatMul: both operands are constant"},
    ),
    "rank 1": (
        [linear("MatMul", ["x", "w"])],
        {"w": matrix(6, 1)},
        {"w": "the weight of shape [1, 6] has rank 1 already"},
    ),
    "empty": ([linear("MatMul", ["x", "w"])], {"w": matrix(6, 0)}, {"w": "the weight of shape [0, 6] has no entries"}),
    "nan": (
        [linear("MatMul", ["x", "w"])],
        {"w": np.full((6, 3), np.nan, F)},
        {"w": "18 of 18 entries of the weight are NaN or infinite"},
    ),
    "quantised": (
        [helper.make_node("DequantizeLinear", ["w", "s"], ["v"]), linear("MatMul", ["x", "v"])],
        {"w": np.ones((6, 3), np.int8), "s": np.array(0.1, F)},
        {"w": "DequantizeLinear: the weight is quantised (int8)"},
    ),
    "gemm bias": (
        [linear("Gemm", ["x", "v", "w"])],
        {"v": matrix(6, 3), "w": matrix(5, 3)},
        {"w": "Gemm: a bias is not decomposed"},
    ),
    "output": (
        [helper.make_node("Identity", ["w"], ["also"]), linear("MatMul", ["x", "w"])],
        {"w": matrix(6, 3)},
        {"w": "it is an output of the graph; its 1 linear use(s) stay dense with it"},
    ),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_is_passed_over_says_why(name: str, build: Build, opened: Opened) -> None:
    nodes, tensors, expected = PASSED_OVER[name]
    inputs: dict[str, Any] = {"x": (F, [5, 6]), "im": (F, ["b", 2, 4, 4])}
    outputs = {"y": F} | ({"also": F} if name == "output" else {})
    program = opened(build(nodes, inputs, outputs, tensors))
    assert reasons(program) == expected
    assert len(program.sites()[0]) == (name == "gemm bias")


def test_weights_in_bodies_and_captured_by_them_are_passed_over(build: Build, opened: Opened) -> None:
    def branch(name: str) -> onnx.GraphProto:
        inner = helper.make_node("MatMul", ["x", "inner"], [f"{name}1"])
        outer = helper.make_node("MatMul", [f"{name}1", "outer"], [f"{name}2"])
        return graph_of([inner, outer], {"inner": matrix(6, 6, 3)})

    nodes = [
        helper.make_node("If", ["flag"], ["h"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node("MatMul", ["h", "outer"], ["k"]),
        helper.make_node("MatMul", ["k", "free"], ["y"]),
    ]
    inputs = {"x": (F, ["b", 6]), "flag": (np.dtype(bool), [])}
    program = opened(build(nodes, inputs, {"y": F}, {"outer": matrix(6, 6), "free": matrix(6, 6, 5)}))
    assert [site.name for site in program.sites()[0]] == ["free"]
    assert reasons(program) == {
        "outer": "used in a subgraph; its 1 linear use(s) stay dense with it",
        "inner": "inside the body of an If, Loop or Scan",
    }


def test_old_opsets_are_passed_over(build: Build, opened: Opened) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    program = opened(build([node], {"x": (F, ["b", 6])}, {"y": F}, {"w": matrix(6, 4)}, opset=6, version=4))
    assert reasons(program) == {"w": "opset 6 is older than 7, where operators broadcast in another way"}


def test_names_from_the_notes_of_exporters(build: Build, opened: Opened) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["a"], name="n1"),
        helper.make_node("MatMul", ["a", "val_2"], ["b"], name="n2"),
        helper.make_node("MatMul", ["b", "onnx::MatMul_3"], ["y"], name="/encoder/layer.0/query/MatMul"),
    ]
    tensors = {name: matrix(6, 6, k) for k, name in enumerate(["val_1", "val_2", "onnx::MatMul_3"])}
    proto = build(nodes, {"x": (F, ["b", 6])}, {"y": F}, tensors)
    helper.set_model_props(proto, {"kept": "yes"})
    notes = {
        "pkg.torch.onnx.name_scopes": "['', 'block', 'block.fc', 'linear']",
        "pkg.torch.onnx.class_hierarchy": "['M', 'Block', 'torch.nn.modules.linear.Linear', 'aten.linear.default']",
    }
    for key, value in notes.items():
        proto.graph.node[0].metadata_props.add(key=key, value=value)
    info = proto.graph.value_info.add(name="val_2")
    info.CopyFrom(helper.make_tensor_value_info("val_2", TensorProto.FLOAT, [6, 6]))
    info.metadata_props.add(key="pkg.onnxscript.optimizer.folded_from", value="['head.weight']")
    sites, _ = opened(proto).sites()
    assert [site.names for site in sites] == [
        ("block.fc.weight", "val_1"),
        ("head.weight", "val_2"),
        ("encoder.layer.0.query.weight", "onnx::MatMul_3"),
    ]
    proto.graph.node[1].metadata_props.extend(proto.graph.node[0].metadata_props)
    info.ClearField("metadata_props")
    assert [site.name for site in opened(proto).sites()[0]][:2] == ["val_1", "val_2"]


def test_order_is_that_of_first_uses(build: Build, opened: Opened) -> None:
    names = ["c", "a", "b"]
    nodes = [helper.make_node("MatMul", [f"x{k}", n], [f"x{k + 1}"]) for k, n in enumerate(names)]
    tensors = {name: matrix(6, 6, k) for k, name in enumerate("abc")}
    sites, _ = opened(build(nodes, {"x0": (F, ["b", 6])}, {"x3": F}, tensors)).sites()
    assert [(site.order, site.name) for site in sites] == [(0, "c"), (1, "a"), (2, "b")]
