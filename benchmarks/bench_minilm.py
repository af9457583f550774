"""all-MiniLM-L6-v2: fidelity, bytes and time against what stays of its 36 encoder linears, and both doors side by side.

    python benchmarks/bench_minilm.py

Sentences of ``tdc demo``: 1024 for the statistics, 64 for the sensitivities, 256 to measure on, disjoint, seed 0.
Fidelity: cosine of the sentence embeddings with the dense model. Time: 16 sentences and 1, one thread, in turn.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_rows
from torch import nn

import tdc
from tdc.demo import Encoder, export_onnx, load_minilm, sentences
from tdc.measure import interleaved

METHODS: dict[str, dict[str, Any]] = {
    "svd, weight metric, uniform": {"allow": "svd", "metric": "weight", "allocation": "uniform"},
    "svd, input metric, uniform": {"allow": "svd", "allocation": "uniform"},
    "pivoted, input metric, uniform": {"allow": "pivoted", "allocation": "uniform"},
    "svd, input metric, allocated": {"allow": "svd"},
    "all, input metric, allocated (default)": {},
}


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    encoder, texts = Encoder(tokenizer), sentences()
    shuffled = [texts[k] for k in torch.randperm(len(texts)).tolist()]
    parts = (shuffled[:1024], shuffled[1024:1088], shuffled[1088:1344])
    calibration, probe, held_out = (encoder.batches(part) for part in parts)
    statistics = tdc.calibrate(model, calibration, probe=probe, exclude="pooler.dense")
    reference = encoder.of_module(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        export_onnx(model, dense)
        rows = [{"method": "dense", "keep": 1, "cosine mean": 1, "onnx bytes": dense.stat().st_size}]
        for keep in (0.8, 0.6, 0.4):
            for method, options in METHODS.items():
                budget = f"params={keep}"
                made = tdc.plan(model, calibration[0], budget=budget, statistics=statistics, **options)
                small = tdc.compress(model, calibration[0], plan=made, statistics=statistics)
                cosine = (encoder.of_module(small, held_out) * reference).sum(-1)
                row = {
                    "method": method,
                    "keep": keep,
                    "sites": tdc.report(small).replaced,
                    "cosine mean": f"{cosine.mean():.4f}",
                    "cosine 5 %": f"{cosine.quantile(0.05):.4f}",
                    "params kept": f"{tdc.report(small).after.params / tdc.report(small).before.params:.4f}",
                    **speeds(model, small, encoder, held_out),
                    **through_onnx(dense, (small, made), encoder, held_out, statistics, options),
                }
                print(row, flush=True)
                rows.append(row)
    write_rows("minilm", rows)


def speeds(model: nn.Module, small: nn.Module, encoder: Encoder, held_out: list[Any]) -> dict[str, str]:
    """Dense over compressed times in PyTorch."""
    row = {}
    for size in (1, 16):
        batch = [{key: value[:size] for key, value in held_out[0].items()}]
        times = interleaved(
            {
                "dense": lambda batch=batch: encoder.of_module(model, batch),
                "small": lambda batch=batch: encoder.of_module(small, batch),
            }
        )
        row[f"torch {size} min"] = f"{times['dense'].minimum / times['small'].minimum:.3f}"
        row[f"torch {size} median"] = f"{times['dense'].median / times['small'].median:.3f}"
    return row


def through_onnx(
    dense: Path,
    compressed: tuple[nn.Module, tdc.Plan],
    encoder: Encoder,
    held_out: list[Any],
    statistics: tdc.Statistics,
    options: dict[str, Any],
) -> dict[str, object]:
    """The same budget through the ONNX door: is the plan equal, how far are the outputs, bytes and times."""
    import onnxruntime

    small, made = compressed
    path = dense.with_name("small.onnx")
    plan = tdc.plan(str(dense), budget=made.budget, statistics=statistics, **options)
    tdc.compress_onnx(dense, path, plan=plan, statistics=statistics)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(str(p), settings, providers=["CPUExecutionProvider"]) for p in (dense, path)
    ]
    difference = (encoder.of_onnx(sessions[1], held_out) - encoder.of_module(small, held_out)).abs().max()
    times = interleaved(
        {
            "dense": lambda: encoder.of_onnx(sessions[0], held_out[:1]),
            "small": lambda: encoder.of_onnx(sessions[1], held_out[:1]),
        }
    )
    return {
        "one plan": plan == made,
        "onnx difference": f"{difference:.1e}",
        "onnx bytes": os.path.getsize(path),
        "onnx 16 min": f"{times['dense'].minimum / times['small'].minimum:.3f}",
        "onnx 16 median": f"{times['dense'].median / times['small'].median:.3f}",
    }


if __name__ == "__main__":
    main()
