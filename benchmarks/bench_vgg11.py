"""VGG11 on CIFAR-10: accuracy, bytes, memory and time against what stays of its convolutions, through both doors.

    python benchmarks/bench_vgg11.py

Training images 0 to 8191 for the statistics, 20000 to 20511 for the sensitivities (what the choice is made from), the
5,000 images of the development part to measure on: disjoint. No labels, no gradient steps. Times: one thread, dense and
compressed in turn, 25 repeats, as dense over compressed. Memory: growth of the resident set by loading and running the
ONNX file on 16 images, in a process of its own.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import resident_growth, write_rows
from torch import Tensor, nn
from vgg import accuracy, cifar, load_vgg11

import tdc
from tdc.measure import interleaved

PLAIN = ("output_svd", "input_svd", "spatial_svd", "tucker2", "svd")
CASES = {
    "all formats": ("params=0.5", "params=0.2", "params=0.1", "params=0.05", "macs=0.5", "macs=0.25"),
    "without gathers": ("params=0.2", "params=0.1"),
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def main() -> None:
    torch.manual_seed(0)
    model = load_vgg11()
    calibration, probe = cifar("train", 8192)[0], cifar("train", 512, 20000)[0]
    images, labels = cifar("dev")
    statistics = tdc.calibrate(model, list(calibration.split(256)), probe=list(probe.split(256)))
    reference = accuracy(model, images, labels)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = folder / "dense.onnx"
        export(model, dense, optimize=True)
        size = dense.stat().st_size
        rows: list[dict[str, object]] = [{"budget": "dense", "accuracy": f"{reference:.2f}", "onnx bytes": size}]
        rows[0]["resident MB"] = f"{resident(dense, images):.0f}"
        for what, budgets in CASES.items():
            allow = PLAIN if what == "without gathers" else None
            for budget in budgets:
                plan = tdc.plan(model, (images[:16],), budget=budget, statistics=statistics, allow=allow)
                small = tdc.compress(model, (images[:16],), plan=plan, statistics=statistics)
                right, report = accuracy(small, images, labels), tdc.report(small)
                row: dict[str, object] = {
                    "budget": budget,
                    "formats": what,
                    "sites": report.replaced,
                    "accuracy": f"{right:.2f}",
                    "lost": f"{reference - right:.2f}",
                    **{f"{q} kept": f"{kept(report, q):.4f}" for q in ("params", "macs", "peak")},
                    **through_onnx(dense, plan, statistics, images),
                    **speeds(model, small, images),
                }
                print(row, flush=True)
                rows.append(row)
    write_rows("vgg11", rows)


def kept(report: tdc.Report, quantity: str) -> float:
    """What stays of the whole model."""
    return float(getattr(report.model_after, quantity) / getattr(report.model_before, quantity))


def speeds(model: nn.Module, small: nn.Module, images: Tensor) -> dict[str, str]:
    """Dense over compressed times in PyTorch, by batch size and memory format."""
    row = {}
    for name, layout in FORMATS.items():
        pair = [m.to(memory_format=layout) for m in (model, small)]
        for size in (1, 16):
            batch = images[:size].contiguous(memory_format=layout)
            times = interleaved({k: lambda m=m, x=batch: m(x) for k, m in zip(("dense", "small"), pair, strict=True)})
            row[f"{name} {size} min"] = f"{times['dense'].minimum / times['small'].minimum:.3f}"
            row[f"{name} {size} median"] = f"{times['dense'].median / times['small'].median:.3f}"
    for m in (model, small):
        m.to(memory_format=torch.contiguous_format)
    return row


def through_onnx(dense: Path, plan: tdc.Plan, statistics: tdc.Statistics, images: Tensor) -> dict[str, object]:
    """The same plan in the ONNX door: bytes on disk, memory and times. (`bench_doors.py` compares the outputs.)"""
    path = dense.with_name("small.onnx")
    tdc.compress_onnx(dense, path, plan=plan, statistics=statistics)
    row: dict[str, object] = {"onnx bytes": path.stat().st_size, "resident MB": f"{resident(path, images):.0f}"}
    sessions = {"dense": onnx_session(dense), "small": onnx_session(path)}
    for size in (1, 16):
        batch = {"x": images[:size].numpy()}
        times = interleaved({name: lambda s=s, b=batch: s.run(None, b) for name, s in sessions.items()})
        row[f"onnx {size} min"] = f"{times['dense'].minimum / times['small'].minimum:.3f}"
        row[f"onnx {size} median"] = f"{times['dense'].median / times['small'].median:.3f}"
    return row


def onnx_session(path: Path) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def resident(path: Path, images: Tensor) -> float:
    return resident_growth(path, {"x": images[:16].numpy()}) / 1e6


def export(model: nn.Module, path: Path, optimize: bool) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 32, 32),),
            dynamo=True,
            optimize=optimize,
            external_data=False,
            verbose=False,
            input_names=["x"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    program.save(str(path))


if __name__ == "__main__":
    main()
