"""Rewriting convolutions: exact at full rank in every spelling, biases, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor

from tdc.errors import VerificationError
from tdc.frontends.onnx import OnnxProgram
from tdc.frontends.program import Change, Replacement
from tdc.ir import Block, Equation, Op, OpKind, Window

from .convolutions import (
    Spec,
    assembled,
    constants_only,
    example,
    lowered,
    model_of,
    rebuilt,
    reference,
    relative,
    runtime,
    specs,
    variants,
)

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.float32
UNTIL_DONE = settings(suppress_health_check=list(HealthCheck), max_examples=120)


def replaced(program: OnnxProgram, choice: int = 0, shift: Tensor | None = None) -> ir.Model:
    """All sites at full rank, each by the decomposition of that number."""
    for site in program.sites()[0]:
        names = variants(site)
        new = lowered(site, program.weight(site), names[choice % len(names)])
        try:
            program.replace(site, Replacement(new.block, new.factors, new.decomposition, shift=shift))
        except VerificationError:  # factors of few entries may come in an order that is no convolution
            assume(False)
    return program.finish()


def runs(spec: Spec) -> bool:
    """Whether onnxruntime runs it: it refuses dilation beside automatic padding."""
    return "SAME" not in spec.auto or max(spec.dilations, default=1) == 1


@UNTIL_DONE
@given(spec=specs(), choice=st.integers(0, 99), double=st.booleans())
def test_exact_at_full_rank(spec: Spec, choice: int, double: bool, opened: Opened) -> None:
    dtype = np.float64 if double else F
    model = model_of(spec, dtype)
    wanted = reference(model_of(spec, np.float64), {"x": example(spec).astype(np.float64)})
    assume(wanted["y"].size)
    batch = {"x": example(spec).astype(dtype)}
    new = replaced(opened(model), choice)
    for name, got in reference(new, batch).items():
        assert relative(got, wanted[name]) < (1e-12 if double else 1e-5)
    if runs(spec) and not double:
        assert relative(runtime(new, batch)["z"], wanted["z"]) < 1e-5
    assert constants_only(new) == []
    assert all(".tdc_" in name or name == "b" for name in new.graph.initializers if name != "a")


@UNTIL_DONE
@given(spec=specs(), scale=st.floats(0.5, 2.0))
def test_outputs_with_other_weights_and_biases(spec: Spec, scale: float, opened: Opened) -> None:
    assume(runs(spec))
    program, batch = opened(model_of(spec)), {"x": example(spec)}
    (site,), _ = program.sites()
    dense = runtime(model_of(spec), batch)["y"]
    assume(dense.size)
    assert relative(program.outputs(batch, {})["y"].numpy(), dense) < 1e-5
    shift = torch.linspace(-1, 1, dense.shape[1], dtype=torch.float64) if site.bias else None
    weight = program.weight(site)
    got = program.outputs(batch, {0: Change(weight * scale, shift)})["y"].numpy()
    bare = program.outputs(batch, {0: Change(weight * 0)})["y"].numpy()
    wanted = bare + scale * (dense - bare)
    if shift is not None:
        wanted = wanted + shift.numpy().reshape(1, -1, *[1] * len(spec.taps))
    assert np.allclose(got, wanted, atol=1e-4)


def with_shift(program: OnnxProgram, batch: Mapping[str, np.ndarray], choice: int) -> tuple[ir.Model, np.ndarray]:
    """The model with a shift cut in, and what the changed dense model gives."""
    (site,), _ = program.sites()
    width = site.matrix[0] * site.matrix[1]
    shift = torch.linspace(-1, 2, width, dtype=torch.float64)
    wanted = program.outputs(batch, {0: Change(program.weight(site), shift)})["y"].numpy()
    return replaced(program, choice, shift), wanted


@UNTIL_DONE
@given(spec=specs(), choice=st.integers(0, 99))
def test_a_shift_is_added_to_the_bias(spec: Spec, choice: int, opened: Opened) -> None:
    assume(runs(spec) and spec.bias)
    batch = {"x": example(spec)}
    new, wanted = with_shift(opened(model_of(spec)), batch, choice)
    assume(wanted.size)
    assert relative(runtime(new, batch)["y"], wanted) < 2e-5
    assert constants_only(new) == []


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("form", ["svd", "pivoted/output"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_shift_of_a_gemm_knows_its_scales(alpha: float, beta: float, form: str, normed: bool, opened: Opened) -> None:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((6, 5)).astype(F), "b": rng.standard_normal((1, 5)).astype(F)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h" if normed else "y"], alpha=alpha, beta=beta)]
    if normed:
        names = ["gamma", "beta", "mean", "variance"]
        tensors |= {name: rng.uniform(0.5, 1.5, 5).astype(F) for name in names}
        nodes.append(helper.make_node("BatchNormalization", ["h", *names], ["y"]))
    x = rng.standard_normal((7, 6)).astype(F)
    model = assembled(nodes, {"x": (F, ["n", 6])}, ("y",), tensors)
    program = opened(model)
    (site,), _ = program.sites()
    shift = torch.linspace(-1, 2, 5, dtype=torch.float64)
    dense = reference(model, {"x": x})["y"]
    wanted = dense + alpha * shift.numpy()
    assert np.allclose(program.outputs({"x": x}, {})["y"], dense, atol=1e-5)
    assert np.allclose(program.outputs({"x": x}, {0: Change(program.weight(site), shift)})["y"], wanted, atol=1e-5)
    new = lowered(site, program.weight(site), form)
    program.replace(site, Replacement(new.block, new.factors, form, shift=shift))
    model = program.finish()
    assert np.allclose(runtime(model, {"x": x})["y"], wanted, atol=1e-5)
    assert constants_only(model) == []


def test_a_shift_goes_into_the_addition_behind_a_product(opened: Opened) -> None:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((6, 5)).astype(F), "b": rng.standard_normal(5).astype(F)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["b", "h"], ["y"], name="add")]
    x = rng.standard_normal((2, 7, 6)).astype(F)
    new, wanted = with_shift_linear(opened(assembled(nodes, {"x": (F, ["n", 7, 6])}, ("y",), tensors)), {"x": x})
    assert np.allclose(runtime(new, {"x": x})["y"], wanted, atol=1e-5)
    assert [node.op_type for node in new.graph] == ["MatMul", "MatMul", "Add"]
    assert sorted(new.graph.initializers) == ["b.tdc_shifted", "w.tdc_u", "w.tdc_v"]


def with_shift_linear(program: OnnxProgram, batch: Mapping[str, np.ndarray]) -> tuple[ir.Model, np.ndarray]:
    (site,), _ = program.sites()
    shift = torch.linspace(-1, 2, site.axes["o"], dtype=torch.float64)
    wanted = program.outputs(batch, {0: Change(program.weight(site), shift)})["y"].numpy()
    new = lowered(site, program.weight(site), "svd")
    program.replace(site, Replacement(new.block, new.factors, "svd", shift=shift))
    return program.finish(), wanted


@pytest.mark.parametrize("bias", ["", "conv", "norm", "conv norm"])
def test_a_bias_is_free(bias: str, opened: Opened) -> None:
    program = opened(model_of(Spec(bias=bias, outputs=8, inputs=8)))
    assert [node.op_type for node in replaced(program).graph] == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", ["conv", "norm"])
def test_a_pivoted_output_takes_its_bias_into_both_parts(bias: str, groups: int, opened: Opened) -> None:
    spec = Spec(groups=groups, outputs=6, inputs=5, bias=bias)
    program, batch = opened(model_of(spec)), {"x": example(spec)}
    (site,), _ = program.sites()
    new = lowered(site, program.weight(site), "pivoted/channels_out", {"r": 4})
    weight = rebuilt(site, program.weight(site))
    wanted = program.outputs(batch, {0: Change(weight)})["y"].numpy()
    program.replace(site, new)
    model = program.finish()
    assert [node.op_type for node in model.graph] == ["Conv", "Conv", "Concat", "Gather", "Add"]
    assert relative(runtime(model, batch)["y"], wanted) < 1e-5


def test_a_bias_that_moves_is_added_or_handed_on(opened: Opened) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3, 3)).astype(F)
    node = helper.make_node("Conv", ["x", "w", "c"], ["y"], name="conv")
    model = assembled([node], {"x": (F, ["n", 5, 8, 8]), "c": (F, [6])}, ("y",), {"w": weight})
    batch = {"x": np.random.default_rng(1).standard_normal((2, 5, 8, 8)).astype(F), "c": np.arange(6, dtype=F)}
    for form, ops in (("output_svd/", ["Conv", "Conv"]), ("pivoted/channels_out", ["Conv", "Conv", "Reshape", "Add"])):
        program = opened(model)
        (site,), _ = program.sites()
        dense = rebuilt(site, program.weight(site), form)
        wanted = program.outputs(batch, {0: Change(dense)})["y"].numpy()
        program.replace(site, lowered(site, program.weight(site), form, {"r": 4}))
        new = program.finish()
        assert [n.op_type for n in new.graph if n.op_type not in ("Concat", "Gather")] == ops
        assert relative(runtime(new, batch)["y"], wanted) < 1e-5


@pytest.mark.parametrize("form", ["output_svd/", "pivoted/channels_out", "svd", "gemm"])
def test_a_shift_of_a_site_without_bias_makes_one(form: str, opened: Opened) -> None:
    rng = np.random.default_rng(0)
    if form in ("svd", "gemm"):
        node = helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5) if form == "gemm" else None
        node = node or helper.make_node("MatMul", ["x", "w"], ["y"])
        batch = {"x": rng.standard_normal((5, 6)).astype(F)}
        model = assembled([node], {"x": (F, [5, 6])}, ("y",), {"w": rng.standard_normal((6, 7)).astype(F)})
    else:
        model, batch = model_of(Spec()), {"x": example(Spec())}
    program = opened(model)
    (site,), _ = program.sites()
    assert not site.bias
    new = lowered(site, program.weight(site), "svd" if form == "gemm" else form)
    shift = torch.arange(site.matrix[1], dtype=torch.float64)
    program.replace(site, Replacement(new.block, new.factors, form, shift=shift))
    added = (0.5 if form == "gemm" else 1.0) * shift.numpy().reshape(1, -1, *[1] * len(site.windows))
    got = runtime(program.finish(), batch)["y"]
    assert np.allclose(got, runtime(model, batch)["y"] + added, atol=1e-5)


def test_large_biases_are_lent_to_the_runtime_or_left_out(opened: Opened) -> None:
    spec = Spec((1,), outputs=400, bias="conv norm")
    program, batch = opened(model_of(spec)), {"x": example(spec)}
    dense = runtime(model_of(spec), batch)["y"]
    assert relative(program.outputs(batch, {})["y"].numpy(), dense) < 1e-5
    spec = Spec((1,), outputs=400, bias="add")
    program = opened(model_of(spec))
    assert relative(program.outputs(batch, {})["y"].numpy(), runtime(model_of(spec), batch)["y"]) < 1e-5


def test_names_notes_and_all_that_is_not_replaced_stay(opened: Opened) -> None:
    model = model_of(Spec(bias="conv norm"))
    model.graph.value_info.add(name="y").CopyFrom(model.graph.output[0])
    program = opened(model)
    before = ir.to_proto(program.model)
    after = ir.to_proto(replaced(program))
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    assert after.graph.node[-1] == before.graph.node[-1]
    assert [node.name for node in after.graph.node] == ["conv.tdc_t0", "conv.tdc_t1", "after"]
    assert after.graph.node[1].doc_string == "a layer"
    assert [entry.value for entry in after.graph.node[0].metadata_props] == ["layer.0"]
    assert list(after.graph.node[1].output) == ["y"]
    assert [tensor.name for tensor in after.graph.initializer] == ["w.tdc_v", "w.tdc_u", "w.tdc_bias"]
    assert ir.to_proto(program.model) == before


def test_sites_that_stay_dense_keep_their_norms(opened: Opened) -> None:
    program = opened(model_of(Spec(bias="conv add norm")))
    assert program.sites()[0][0].norm == "norm"
    assert ir.to_proto(program.finish()) == ir.to_proto(program.model)


def test_a_bias_that_others_read_stays_for_them(opened: Opened) -> None:
    model = model_of(Spec(bias="conv"))
    model.graph.node.append(helper.make_node("Identity", ["b"], ["also"]))
    model.graph.output.append(helper.make_tensor_value_info("also", onnx.TensorProto.FLOAT, [4]))
    program, batch = opened(model), {"x": example(Spec())}
    new, wanted = with_shift(program, batch, 0)
    out = runtime(new, batch)
    assert np.array_equal(out["also"], runtime(model, batch)["also"])
    assert relative(out["y"], wanted) < 1e-5


def test_a_shape_of_the_weight_becomes_a_constant(opened: Opened) -> None:
    model = model_of(Spec())
    model.graph.node.append(helper.make_node("Shape", ["w"], ["s"], start=1, end=3))
    model.graph.node.append(helper.make_node("Add", ["s", "k"], ["t"]))
    model.graph.input.append(helper.make_tensor_value_info("k", onnx.TensorProto.INT64, [2]))
    model.graph.output.append(helper.make_tensor_value_info("t", onnx.TensorProto.INT64, [2]))
    new = replaced(opened(model))
    assert list(runtime(new, {"x": example(Spec()), "k": np.zeros(2, np.int64)})["t"]) == [3, 3]
    assert "w" not in new.graph.initializers


def test_tied_convolutions_share_their_factors(opened: Opened) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(F)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = {"w": weight, "w2": weight.copy(), "b": np.ones(3, F)}
    model = assembled(nodes, {"x": (F, ["n", 3, 8, 8])}, ("y",), tensors)
    batch = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(F)}
    program = opened(model)
    doubled = program.outputs(batch, {0: Change(torch.from_numpy(2 * weight))})["y"]
    by_hand = assembled(nodes, {"x": (F, ["n", 3, 8, 8])}, ("y",), tensors | {"w": 2 * weight, "w2": 2 * weight})
    assert relative(doubled.numpy(), runtime(by_hand, batch)["y"]) < 1e-5
    new = replaced(program)
    assert sorted(new.graph.initializers) == ["b", "w.tdc_u", "w.tdc_v"]
    assert relative(runtime(new, batch)["y"], runtime(model, batch)["y"]) < 1e-5


def test_what_cannot_be_written_is_refused_before_the_cut(opened: Opened) -> None:
    program = opened(model_of(Spec((1,))))
    (site,), _ = program.sites()
    window, sizes = Window("p"), (("g", 1), ("o", 4), ("i", 3), ("p", 1))
    bad = Op("conv", "t0", ("x", "f"), Equation.parse("b g i p, (g o) r p -> b g i o r"), windows=(window,))
    cases = {
        "are not its groups and its inputs": Block((("f", (4, 1, 1)),), (bad,), "t0", sizes, kind=OpKind.CONV1D),
        "the block of a linear for a conv1d": Block((("f", (4, 1, 1)),), (), "x", sizes),
        "cannot write 't0 = matmul": Block(
            (("f", (4, 3)),),
            (Op("matmul", "t0", ("x", "f"), Equation.parse("b i, o i -> b o")),),
            "t0",
            sizes,
            kind=OpKind.CONV1D,
        ),
    }
    for message, block in cases.items():
        factors = {name: torch.zeros(shape) for name, shape in block.factors}
        with pytest.raises(VerificationError, match=message):
            program.replace(site, Replacement(block, factors, "none"))
    assert ir.to_proto(program.finish()) == ir.to_proto(program.model)
