"""Convolutions from file to file: what exporters write, one set of sites for both doors, and a real detector."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.frontends.nn import NnProgram
from tdc.frontends.onnx import OnnxProgram, load_model
from tdc.ir import Candidate, Plan, Site

EXPORTERS = ("dynamo", "dynamo plain", "script", "script plain")


class Net(nn.Module):
    """All that matters to a convolution: strides, ``same``, dilation, groups, norms, pools, and a head with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.ReLU6(), nn.Dropout()),
            *(nn.Conv2d(16, 24, (3, 4), padding="same"), nn.Hardswish()),
            *(nn.Conv2d(24, 24, 3, groups=2, bias=False), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(24, 24, 3, stride=2, padding=(1, 0)), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1)),
            *(nn.Conv2d(24, 24, 1), nn.SiLU()),
        )
        self.hidden, self.norm, self.head = nn.Linear(24, 12), nn.BatchNorm1d(12), nn.Linear(12, 5, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for parameter in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(parameter)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.features(x).flatten(1))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def export(model: nn.Module, x: Tensor, exporter: str, path: Path) -> Path:
    plain = "plain" in exporter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "dynamo" in exporter:
            made = torch.onnx.export(
                model, (x,), dynamo=True, optimize=not plain, verbose=False, dynamic_shapes=({0: "n"},)
            )
            assert made is not None
            proto = made.model_proto
        else:
            mode = torch.onnx.TrainingMode.PRESERVE if plain else torch.onnx.TrainingMode.EVAL
            file = io.BytesIO()
            torch.onnx.export(model, (x,), file, dynamo=False, do_constant_folding=not plain, training=mode)
            proto = onnx.load_from_string(file.getvalue())
    onnx.save(proto, path)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def facts(site: Site) -> tuple[Any, ...]:
    return site.kind, site.sizes, site.attributes, site.uses, site.bias, site.pointwise_consumer


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_both_doors_find_the_same_sites(exporter: str, net: Net, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    ours, remarks = OnnxProgram(load_model(export(net, x, exporter, tmp_path / "m.onnx"))).sites()
    theirs, _ = NnProgram(net, x).sites()
    assert remarks == ()
    assert [facts(site) for site in ours] == [facts(site) for site in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.sketch == pytest.approx(b.sketch, abs=1e-4)
        assert b.name in a.names


def at_full_rank(path: Path, wanted: str) -> Plan:
    """Every site replaced, exactly."""
    choices = []
    for site in OnnxProgram(load_model(path)).sites()[0]:
        name = wanted if site.kind.is_conv else "svd"
        variant = decompositions.get(name).variants(site.axes)[-1]
        ranks = decompositions.get(name).full_ranks(site.axes, variant)
        choices.append(Candidate(site, name, variant, tuple(ranks.items())))
    return Plan(tuple(choices))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("decomposition", ["output_svd", "input_svd", "tucker2", "pivoted"])
def test_a_full_rank_plan_gives_the_same_function(decomposition: str, exporter: str, net: Net, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    path = export(net, x, exporter, tmp_path / "m.onnx")
    report = tdc.compress_onnx(path, tmp_path / "s.onnx", plan=at_full_rank(path, decomposition), progress=False)
    assert all(site.decomposition != "dense" for site in report.sites)
    assert relative(run(tmp_path / "s.onnx", x.numpy()), net(x).detach().numpy()) < 1e-5
    left = {node.op_type for node in onnx.load(tmp_path / "s.onnx").graph.node}
    assert "BatchNormalization" not in left


def low_rank_net(path: Path, rank: int = 8) -> Path:
    """Three convolutions of rank 8 with biases, a pool and a product."""
    rng, tensors, nodes, last, width = np.random.default_rng(0), {}, [], "x", 3
    for k, (outputs, stride) in enumerate([(32, 1), (64, 2), (64, 1)]):
        left, right = rng.standard_normal((outputs, rank)), rng.standard_normal((rank, width * 9))
        tensors[f"w{k}"] = (left @ right / (3 * width * rank) ** 0.5).reshape(outputs, width, 3, 3)
        tensors[f"b{k}"] = rng.standard_normal(outputs)
        attributes = {"pads": [1, 1, 1, 1], "strides": [stride, stride]}
        nodes.append(helper.make_node("Conv", [last, f"w{k}", f"b{k}"], [f"h{k}"], name=f"conv{k}", **attributes))
        nodes.append(helper.make_node("Relu", [f"h{k}"], [f"r{k}"]))
        last, width = f"r{k}", outputs
    nodes += [helper.make_node("GlobalAveragePool", [last], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(entries.astype(np.float32), name) for name, entries in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_calibrated_compression_finds_the_rank(tmp_path: Path) -> None:
    path = low_rank_net(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((16, 3, 16, 16)).astype(np.float32)
    batches = [{"x": x[:8]}, {"x": x[8:]}]
    report = tdc.compress_onnx(path, tmp_path / "s.onnx", budget="params=0.4", calibration=batches, progress=False)
    assert sum(site.decomposition != "dense" for site in report.sites) >= 2
    for size in (16, 21):
        x = np.random.default_rng(2).standard_normal((2, 3, size, size)).astype(np.float32)
        assert relative(run(tmp_path / "s.onnx", x), run(path, x)) < 1e-5


def test_a_replaced_layer_keeps_the_mean_of_every_output(tmp_path: Path) -> None:
    path = low_rank_net(tmp_path / "m.onnx", rank=40)
    x = np.random.default_rng(1).standard_normal((16, 3, 16, 16)).astype(np.float32) + 0.5
    report = tdc.compress_onnx(
        path, tmp_path / "s.onnx", budget="params=0.5", calibration=[{"x": x}], exclude=("w1", "w2"), progress=False
    )
    assert [site.decomposition != "dense" for site in report.sites] == [True]
    outputs = []
    for file in (path, tmp_path / "s.onnx"):
        model = onnx.load(file)
        model.graph.output.append(helper.make_tensor_value_info("h0", TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(["h0"], {"x": x})[0].astype(np.float64))
    assert relative(outputs[1], outputs[0]) > 1e-2
    assert relative(outputs[1].mean((0, 2, 3)), outputs[0].mean((0, 2, 3))) < 1e-5


def detector() -> Path | None:
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "models" / "ch_PP-OCRv4_det_infer.onnx"


@pytest.mark.skipif(detector() is None, reason="rapidocr_onnxruntime is not installed")
def test_a_text_detector_at_two_sizes(tmp_path: Path) -> None:
    path = detector()
    assert path is not None
    sites, remarks = OnnxProgram(load_model(path)).sites()
    assert (len(sites), sum(site.axes["g"] == 1 for site in sites)) == (62, 48)
    assert {remark.reason for remark in remarks} == {"ConvTranspose: not handled"}
    assert sum(bool(site.norm) for site in sites) == 2
    report = tdc.compress_onnx(path, tmp_path / "s.onnx", budget="params=0.7", progress=False)
    assert sum(site.decomposition != "dense" for site in report.sites) >= 20
    for size in ((64, 96), (160, 128)):
        x = np.random.default_rng(0).uniform(-1, 1, (1, 3, *size)).astype(np.float32)
        assert run(tmp_path / "s.onnx", x).shape == run(path, x).shape == (1, 1, *size)
