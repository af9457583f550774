"""Fits to what the cut model makes of the data: a file gets the same ones as the module that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import tdc

WIDTH, DEPTH = 32, 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.sin())
        return x


def as_file(model: Residual, path: Path) -> Path:
    steps = [f"s{k} = Sin(x{k}) p{k} = MatMul(s{k}, w{k}) q{k} = Add(p{k}, b{k})" for k in range(DEPTH)]
    body = " ".join(f"{step} x{k + 1} = Add(x{k}, q{k})" for k, step in enumerate(steps))
    ends = f"(float[n, {WIDTH}] x0) => (float[n, {WIDTH}] x{DEPTH})"
    graph = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {ends} {{ {body} }}')
    for k, layer in enumerate(model.layers):
        for name, tensor in ((f"w{k}", layer.weight.T), (f"b{k}", layer.bias)):
            graph.graph.initializer.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
    onnx.save(graph, path)
    return path


def test_files_get_the_anchored_fits_of_modules(tmp_path: Path) -> None:
    model = Residual().eval()
    data = torch.randn(2400, WIDTH, generator=torch.Generator().manual_seed(1))
    batches, held_out = list(data[:2000].split(250)), data[2000:]
    source = as_file(model, tmp_path / "dense.onnx")
    known = tdc.calibrate(model, batches, metric="input", progress=False)
    options: dict[str, Any] = {"statistics": known, "budget": "params=0.5", "progress": False}
    small = tdc.compress(model, (batches[0],), calibration=batches, **options)
    lost = []
    for name, given in (("anchored", [{"x0": b.numpy()} for b in batches]), ("plain", None)):
        report = tdc.compress_onnx(source, tmp_path / f"{name}.onnx", calibration=given, **options)
        assert report.replaced == DEPTH
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"))
        (found,) = session.run(None, {"x0": held_out.numpy()})
        with torch.no_grad():
            lost.append(float((torch.from_numpy(found) - model(held_out)).square().sum()))
            if given is not None:
                assert np.allclose(found, small(held_out).numpy(), atol=1e-3)
    assert lost[0] < 0.9 * lost[1]
