"""VGG11 through the three doors: one plan, and how far the outputs of the same plan lie apart.

    python benchmarks/bench_doors.py

Training images 0 to 2047 for the statistics, 20000 to 20255 for the sensitivities, 256 images of the development part
to compare on: disjoint. Differences are the greatest of any logit between the compressed module and the compiled model
or the compressed export in onnxruntime; the dense logits reach 6 in magnitude.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_vgg11 import export, onnx_session
from common import write_rows
from vgg import cifar, load_vgg11

import tdc
from tdc import _parts


def row_of(door: str, budget: str, equal: bool, difference: np.ndarray) -> dict[str, object]:
    row = {"door": door, "budget": budget, "plans equal": equal}
    print(row := {**row, "greatest difference": f"{np.abs(difference).max():.1e}"}, flush=True)
    return row


def main() -> None:
    model = load_vgg11()
    calibration, probe = cifar("train", 2048)[0], cifar("train", 256, 20000)[0]
    images = cifar("dev", 256)[0].contiguous()
    statistics = tdc.calibrate(model, list(calibration.split(256)), probe=[probe])
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for budget in ("params=0.5", "params=0.1"):
            plan = tdc.plan(model, (images[:16],), budget=budget, statistics=statistics)
            small = tdc.compress(model, (images[:16],), plan=plan, statistics=statistics)
            with torch.no_grad():
                expected = small(images).numpy()
            options: dict[str, Any] = {"budget": budget, "statistics": statistics, "inner": "eager", "strict": True}
            fast = torch.compile(model, backend="tdc", options=options)
            with torch.no_grad():
                answer = fast(images).numpy()
            *_, part = _parts.parts()
            assert part.outcome is not None
            rows.append(row_of("fx", budget, part.outcome.plan == plan, answer - expected))
            torch._dynamo.reset()
            for optimize in (True, False):
                dense, path = folder / "dense.onnx", folder / "small.onnx"
                export(model, dense, optimize)
                again = tdc.plan(dense, budget=budget, statistics=statistics)
                tdc.compress_onnx(dense, path, plan=plan, statistics=statistics)
                answer = onnx_session(path).run(None, {"x": images.numpy()})[0]
                door = f"onnx, optimize={optimize}"
                rows.append(row_of(door, budget, again == plan, answer - expected))
    write_rows("vgg11_doors", rows)


if __name__ == "__main__":
    main()
