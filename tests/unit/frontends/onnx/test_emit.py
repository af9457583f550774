"""Rewriting: exact at full rank in every spelling, and nothing else is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tdc import decompositions, targets
from tdc.errors import VerificationError
from tdc.frontends.onnx import OnnxProgram, save_model
from tdc.frontends.program import Change, Replacement
from tdc.ir import Block, Equation, Metric, Op, OpKind, Site
from tdc.planning.path import contraction_paths

Opened = Callable[[onnx.ModelProto], OnnxProgram]
Build = Callable[..., onnx.ModelProto]
F = np.dtype("float32")
FORMS = ("svd", "pivoted/input", "pivoted/output")


def lowered(
    weight: Tensor, form: str, ranks: Mapping[str, int] | None = None
) -> tuple[Block, dict[str, Tensor], Tensor]:
    """A block with its factors, and the dense weight that they stand for."""
    name, _, variant = form.partition("/")
    decomposition = decompositions.get(name)
    axes = {"o": weight.shape[0], "i": weight.shape[1]}
    layout = decomposition.layout(axes, ranks or decomposition.full_ranks(axes, variant), variant)
    factors = decomposition.fit(weight.double(), layout, Metric("weight"))
    block = targets.get("cpu").lower(OpKind.LINEAR, layout, contraction_paths(OpKind.LINEAR, layout))
    assert isinstance(block, Block)
    dense = decompositions.rebuild(factors, layout)
    return block, {key: f.to(weight) if f.is_floating_point() else f for key, f in factors.items()}, dense


def replace_all(program: OnnxProgram, form: str, ranks: Mapping[str, int] | None = None) -> ir.Model:
    for site in program.sites()[0]:
        block, factors, _ = lowered(program.weight(site), form, ranks)
        program.replace(site, Replacement(block, factors, form))
    return program.finish()


def run(model: ir.Model, batch: Mapping[str, np.ndarray], level: int | None = None) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(batch)), strict=True))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def no_node_has_only_constant_inputs(model: ir.Model) -> bool:
    constant = {name for name, value in model.graph.initializers.items() if not value.is_graph_input()}
    for node in model.graph:
        inputs = [value.name for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (inputs and all(name in constant for name in inputs)):
            return False
    return True


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
def test_exact_at_full_rank(form: str, dtype: Any, spelling: str, source: str, case: Callable[..., Any]) -> None:
    made = case(spelling, source, dtype)
    model = replace_all(made.program, form)
    out = run(model, made.batch)["y"]
    assert relative(out, made.output) < (1e-12 if dtype == np.float64 else 1e-5)
    assert no_node_has_only_constant_inputs(model)
    assert all(not name.startswith("w") or ".tdc_" in name for name in model.graph.initializers)


@pytest.mark.parametrize("form", FORMS)
def test_below_full_rank_it_is_the_rebuilt_weight(form: str, spelling: str, case: Callable[..., Any]) -> None:
    made = case(spelling, "initializer", np.float64)
    _, _, dense = lowered(torch.from_numpy(made.weight), form, {"r": 3})
    wanted = made.program.outputs(made.batch, {0: Change(dense)})["y"].numpy()
    out = run(replace_all(made.program, form, {"r": 3}), made.batch, 0)["y"]
    assert relative(out, wanted) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_opset_10_has_no_negative_axes(form: str, build: Build, opened: Opened) -> None:
    w = np.random.default_rng(0).standard_normal((6, 8))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["v", "h"], ["y"])]
    inputs = {"x": (np.dtype(float), [2, 3, 6])}
    v = np.random.default_rng(1).standard_normal((7, 3))
    program = opened(build(nodes, inputs, {"y": float}, {"w": w, "v": v}, opset=10, version=5))
    assert len(program.sites()[0]) == 2
    model = replace_all(program, form, {"r": 3} if form == "svd" else None)
    axes = [node.attributes.get_int("axis", 0) for node in model.graph]
    assert min(axes) >= 0
    x = np.random.default_rng(2).standard_normal((2, 3, 6))
    if form != "svd":
        assert relative(run(model, {"x": x})["y"], v @ (x @ w)) < 1e-12


def test_a_plain_gemm_keeps_its_bias_in_the_last_product(case: Callable[..., Any]) -> None:
    made = case("gemm-right-00")
    ops = [node.op_type for node in replace_all(made.program, "svd", {"r": 3}).graph]
    assert ops == ["MatMul", "Gemm", "Identity"]


def test_scales_and_bias_are_folded_at_rewrite_time(case: Callable[..., Any]) -> None:
    made = case("gemm-fixed-bias")
    model = replace_all(made.program, "pivoted/output", {"r": 3})
    assert [node.op_type for node in model.graph][-4:] == ["Gather", "Mul", "Add", "Identity"]
    assert "c" not in model.graph.initializers
    scaled = model.graph.initializers["c.tdc_scaled"].const_value
    assert scaled is not None
    (bias,) = [numpy_helper.to_array(t) for t in made.proto.graph.initializer if t.name == "c"]
    assert np.array_equal(scaled.numpy(), 2 * bias)


def test_everything_else_stays(build: Build, opened: Opened) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="replaced", doc_string="about it"),
        helper.make_node("Add", ["h", "b"], ["y"], name="bias"),
        helper.make_node("MatMul", ["x", "one"], ["z"], name="kept"),
        helper.make_node("Identity", ["unused"], ["u"], name="idle"),
    ]
    tensors = {
        **{"w": rng.standard_normal((6, 8)).astype(F), "b": np.ones(8, F), "one": np.ones((6, 1), F)},
        **{"unused": np.ones((2, 2), F), "loose": np.ones(3, F), "w.tdc_u": np.ones(1, F)},
    }
    proto = build(nodes, {"x": (F, ["rows", 6])}, {"y": F, "z": F, "h": F}, tensors)
    proto.graph.node[0].metadata_props.add(key="scope", value="layer.0")
    proto.graph.doc_string, proto.doc_string, proto.model_version = "graph text", "model text", 7
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    helper.set_model_props(proto, {"author": "me"})
    program = opened(proto)
    before = ir.to_proto(program.model)
    after = ir.to_proto(replace_all(program, "svd", {"r": 3}))
    assert [node.op_type for node in after.graph.node] == ["MatMul", "MatMul", "Add", "MatMul", "Identity"]
    assert list(after.graph.node[2:]) == list(before.graph.node[1:])
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    for key in ("ir_version", "opset_import", "producer_name", "metadata_props", "doc_string", "model_version"):
        assert getattr(after, key) == getattr(before, key), key
    kept = [tensor for tensor in before.graph.initializer if tensor.name != "w"]
    assert list(after.graph.initializer[: len(kept)]) == kept
    assert [tensor.name for tensor in after.graph.initializer[len(kept) :]] == ["w.tdc_v", "w.tdc_u_1"]
    first, last = after.graph.node[:2]
    assert [(p.key, p.value) for p in first.metadata_props] == [(p.key, p.value) for p in last.metadata_props]
    assert last.metadata_props[0].value == "layer.0"
    assert last.output[0] == "h"
    assert last.doc_string == "about it"
    assert first.name.startswith("replaced.tdc_")
    info = {value.name: value.type.tensor_type for value in after.graph.value_info}[first.output[0]]
    assert [d.dim_param or d.dim_value for d in info.shape.dim] == ["rows", 3]


def test_tied_factors_are_stored_once_per_orientation(build: Build, opened: Opened) -> None:
    w = np.random.default_rng(0).standard_normal((6, 6))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "wt"], ["k"], transB=1),
        helper.make_node("Transpose", ["k"], ["kt"]),
        helper.make_node("MatMul", ["wt", "kt"], ["y"]),
    ]
    program = opened(build(nodes, {"x": (np.dtype(float), ["b", 6])}, {"y": float}, {"w": w, "wt": w.T.copy()}))
    (site,), _ = program.sites()
    assert site.uses == 3
    model = replace_all(program, "svd")
    assert sorted(model.graph.initializers) == ["w.tdc_u", "w.tdc_u_1", "w.tdc_v", "w.tdc_v_1"]
    x = np.random.default_rng(1).standard_normal((3, 6))
    assert relative(run(model, {"x": x})["y"], w.T @ (x @ w @ w).T) < 1e-12


def test_a_value_that_a_body_captures_keeps_its_name(build: Build, opened: Opened) -> None:
    then = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["t"])],
        "t",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="n"),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=then),
    ]
    w = np.random.default_rng(0).standard_normal((6, 5)).astype(F)
    program = opened(build(nodes, {"x": (F, ["b", 6]), "flag": (np.dtype(bool), [])}, {"y": F}, {"w": w}))
    model = replace_all(program, "svd")
    x = np.ones((2, 6), F)
    assert relative(run(model, {"x": x, "flag": np.array(True)})["y"], x @ w) < 1e-5


def test_repeated_node_names_are_made_unique(build: Build, opened: Opened) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="n"), helper.make_node("Relu", ["h"], ["y"], name="n")]
    program = opened(build(nodes, {"x": (F, ["b", 6])}, {"y": F}, {"w": np.eye(6, 5, dtype=F)}))
    names = [node.name for node in replace_all(program, "svd").graph]
    assert len(set(names)) == len(names) == 3


def test_nothing_noted_gives_an_equal_model(case: Callable[..., Any]) -> None:
    program = case("right", "chain").program
    assert ir.to_proto(program.finish()) == ir.to_proto(program.model)


def test_a_second_run_finds_only_factors(case: Callable[..., Any], tmp_path: Path) -> None:
    program = case("right").program
    save_model(replace_all(program, "svd", {"r": 2}), tmp_path / "small.onnx")
    from tdc.frontends.onnx import load_model

    sites, remarks = OnnxProgram(load_model(tmp_path / "small.onnx"), None).sites()
    assert [site.name for site in sites] == ["w.tdc_v", "w.tdc_u"]
    assert remarks == ()


def bad_block(equation: str) -> Block:
    ops = (Op("matmul", "t0", ("x", "f"), Equation.parse(equation)),)
    return Block((("f", (10, 6)),), ops, "t0", (("o", 10), ("i", 6)))


def test_what_cannot_be_written_is_refused_before_the_cut(case: Callable[..., Any]) -> None:
    program = case("right").program
    (site,), _ = program.sites()
    factor = torch.zeros(10, 6)
    cases: list[tuple[Block, dict[str, Tensor], str]] = [
        (bad_block("b i, o j -> b o"), {"f": factor}, "cannot write a product"),
        (bad_block("b i, (o p) i -> b o p"), {"f": factor}, "cannot write a product"),
        (bad_block("b i, o i -> b o"), {}, "factor 'f' has shape none"),
        (bad_block("b i, o i -> b o"), {"f": factor.T}, r"shape \[6, 10\], not \[10, 6\]"),
        (bad_block("b i, o i -> b o"), {"f": factor.double()}, "dtype float64, not float32"),
    ]
    for block, factors, message in cases:
        with pytest.raises(VerificationError, match=message):
            program.replace(site, Replacement(block, factors, "none"))
    unknown = dataclasses.replace(bad_block("b i, o i -> b o"), ops=(Op("fold", "t0", ("x", "f")),))
    with pytest.raises(VerificationError, match="cannot write 't0 = fold"):
        program.replace(site, Replacement(unknown, {"f": factor}, "none"))
    assert ir.to_proto(program.finish()) == ir.to_proto(program.model)


def test_bfloat16_factors_keep_their_bits(build: Build, opened: Opened) -> None:
    weight = torch.randn(5, 4).bfloat16()
    raw = weight.T.contiguous().view(torch.uint16).numpy().tobytes()
    proto = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {}, {}, {})
    proto.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[4, 5], raw_data=raw))
    proto.graph.input.append(helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["b", 4]))
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["b", 5]))
    program = opened(proto)
    site: Site = program.sites()[0][0]
    block, factors, _ = lowered(program.weight(site), "svd", {"r": 2})
    program.replace(site, Replacement(block, factors, "svd"))
    made = ir.to_proto(program.finish())
    (u,) = [tensor for tensor in made.graph.initializer if tensor.name == "w.tdc_u"]
    assert u.raw_data == factors["u"].T.contiguous().view(torch.uint16).numpy().tobytes()
