"""Small models around one convolution, and ways to run them: for the tests in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from tdc import decompositions, targets
from tdc.frontends.program import Replacement
from tdc.ir import Block, Metric, Site
from tdc.planning.path import contraction_paths

AUTO = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
FORMS = ("output_svd", "input_svd", "tucker2", "spatial_svd", "pivoted")


@dataclass(frozen=True)
class Spec:
    """One convolution with what stands around it."""

    taps: tuple[int, ...] = (3, 3)
    groups: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto: str = "NOTSET"
    outputs: int = 4
    inputs: int = 3
    length: int = 9
    bias: str = ""
    """Any of ``conv`` (third input), ``add`` (an Add behind it) and ``norm`` (a BatchNormalization behind both)."""
    constant: bool = False
    seed: int = 0


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int, count: int = axes) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    auto = draw(st.sampled_from(AUTO))
    bias = " ".join(part for part in ("conv", "add", "norm") if draw(st.booleans()))
    pads = each(0, 2, 2 * axes) if auto == "NOTSET" else ()
    taps, (outputs, inputs), groups = each(1, 3), each(2, 4, 2), draw(st.integers(1, 3))
    strides, dilations = each(1, 3), each(1, 2)
    length, constant, seed = draw(st.integers(5, 9)), draw(st.booleans()), draw(st.integers(0, 99))
    return Spec(taps, groups, strides, dilations, pads, auto, outputs, inputs, length, bias, constant, seed)


def arrays(spec: Spec, dtype: Any) -> dict[str, np.ndarray]:
    """Weight, biases, and parameters of the normalisation."""
    rng = np.random.default_rng(spec.seed)
    width = spec.groups * spec.outputs
    made = {"w": rng.standard_normal((width, spec.inputs, *spec.taps))}
    made |= {name: rng.standard_normal(width) for name in ("b", "gamma", "beta", "mean")}
    made["variance"] = rng.uniform(0.2, 2, width)
    made["a"] = rng.standard_normal((1, width, *[1] * len(spec.taps)))
    return {name: entries.astype(dtype) for name, entries in made.items()}


def model_of(spec: Spec, dtype: Any = np.float32, opset: int = 15) -> onnx.ModelProto:
    """``y``: the convolution of ``x`` with all that stands behind it, and ``z = 2 y``."""
    tensors = arrays(spec, dtype)
    attributes: dict[str, Any] = {"group": spec.groups}
    if spec.strides:
        attributes["strides"] = spec.strides
    if spec.dilations:
        attributes["dilations"] = spec.dilations
    attributes |= {"pads": spec.pads} if spec.pads else {}
    attributes |= {"auto_pad": spec.auto} if spec.auto != "NOTSET" else {}
    steps = [part for part in ("add", "norm") if part in spec.bias.split()]
    ends = iter([*(f"h{k}" for k in range(len(steps))), "y"])
    last, used = next(ends), ["x", "w", "b"] if "conv" in spec.bias else ["x", "w"]
    nodes = [helper.make_node("Conv", used, [last], name="conv", doc_string="a layer", **attributes)]
    for step in steps:
        before, last = last, next(ends)
        if step == "add":
            nodes.append(helper.make_node("Add", [before, "a"], [last], name="add"))
        else:
            inputs = [before, "gamma", "beta", "mean", "variance"]
            nodes.append(helper.make_node("BatchNormalization", inputs, [last], name="norm", epsilon=1e-3))
    nodes.append(helper.make_node("Add", ["y", "y"], ["z"], name="after"))
    nodes[0].metadata_props.add(key="scope", value="layer.0")
    read = {name for node in nodes for name in node.input}
    tensors = {name: entries for name, entries in tensors.items() if name in read}
    if spec.constant:
        value = numpy_helper.from_array(tensors.pop("w"), "value")
        nodes.insert(0, helper.make_node("Constant", [], ["w"], name="weight", value=value))
    shape = ["n", spec.groups * spec.inputs, *[spec.length + k for k in range(len(spec.taps))]]
    return assembled(nodes, {"x": (dtype, shape)}, ("y", "z"), tensors, opset)


def assembled(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[Any, list[Any]]],
    outputs: tuple[str, ...],
    tensors: Mapping[str, np.ndarray],
    opset: int = 15,
) -> onnx.ModelProto:
    def info(name: str, dtype: Any, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    first = next(iter(inputs.values()))[0]
    graph = helper.make_graph(
        nodes,
        "graph",
        [info(name, *given) for name, given in inputs.items()],
        [info(name, first, None) for name in outputs],
        [numpy_helper.from_array(entries, name) for name, entries in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for value in model.graph.output:
        value.CopyFrom(shapes[value.name])
    return model


def example(spec: Spec, dtype: Any = np.float32, count: int = 2) -> np.ndarray:
    shape = (count, spec.groups * spec.inputs, *[spec.length + k for k in range(len(spec.taps))])
    return np.random.default_rng(spec.seed + 1000).standard_normal(shape).astype(dtype)


def runtime(model: ir.Model | onnx.ModelProto, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """onnxruntime's outputs of a checked model."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(batch)), strict=True))


def reference(model: ir.Model | onnx.ModelProto, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by the definition of the operators, in numpy."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    names = [output.name for output in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(names, dict(batch)), strict=True))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def variants(site: Site) -> list[str]:
    """All ``decomposition/variant`` for a site."""
    return [f"{name}/{variant}" for name in FORMS for variant in decompositions.get(name).variants(site.axes)]


def lowered(site: Site, weight: Tensor, form: str, ranks: Mapping[str, int] | None = None) -> Replacement:
    """A replacement of a site, at full rank where no ranks are given."""
    name, _, variant = form.partition("/")
    decomposition = decompositions.get(name)
    layout = decomposition.layout(site.axes, ranks or decomposition.full_ranks(site.axes, variant), variant)
    factors = decomposition.fit(weight.double(), layout, Metric("weight"))
    block = targets.get("cpu").lower(site.kind, layout, contraction_paths(site.kind, layout, site.windows))
    assert isinstance(block, Block)
    stored = {key: f.to(weight.dtype) if f.is_floating_point() else f for key, f in factors.items()}
    return Replacement(block, {name: stored[name] for name, _ in block.factors}, form)


def constants_only(model: ir.Model) -> list[str]:
    """Nodes that a constant folder would remove."""
    constant = {name for name, value in model.graph.initializers.items() if not value.is_graph_input()}
    found = []
    for node in model.graph:
        inputs = [value.name for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (inputs and all(name in constant for name in inputs)):
            found.append(node.name or "")
    return found


def rebuilt(site: Site, weight: Tensor, form: str = "pivoted/channels_out") -> Tensor:
    """The weight that a decomposition of rank 4 stands for."""
    name, _, variant = form.partition("/")
    layout = decompositions.get(name).layout(site.axes, {"r": 4}, variant)
    factors = decompositions.get(name).fit(weight.double(), layout, Metric("weight"))
    return decompositions.rebuild(factors, layout).to(weight.dtype)
