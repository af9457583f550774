"""Compiled models: decomposed by the backend ``tdc`` against dense by Inductor, in turn; and their memory.

``python benchmarks/bench_compile.py [minilm] [vgg11]``; ``--smoke`` for a short run that writes nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import write_rows
from torch import Tensor, nn

import tdc
from tdc.measure import interleaved

BUDGETS = {"minilm": "params=0.5", "vgg11": "params=0.3"}
CALLS = 8


def minilm(batch: int) -> tuple[nn.Module, Callable[[Any], Tensor], list[Any]]:
    """The model, how it is called on one batch, and calibration batches."""
    from tdc.demo import Encoder, load_minilm, sentences

    model, tokenizer = load_minilm()
    texts, encoder = sentences(), Encoder(tokenizer, length=32)
    encoder.tokenizer.padding_side = "right"
    calibration = [_padded(b) for b in encoder.batches(texts[: 16 * CALLS])]
    held_out = {name: value[:batch] for name, value in _padded(encoder.batches(texts[-16:])[0]).items()}
    return model, lambda compiled: compiled(**held_out).last_hidden_state, calibration


def _padded(batch: dict[str, Tensor], length: int = 32) -> dict[str, Tensor]:
    """Every batch of one length, so that one compilation serves all."""
    return {name: nn.functional.pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


def vgg11(batch: int) -> tuple[nn.Module, Callable[[Any], Tensor], list[Any]]:
    from vgg import cifar, load_vgg11

    images = cifar("train", 64 * CALLS)[0]
    held_out = cifar("dev", batch)[0]
    return load_vgg11(), lambda compiled: compiled(held_out), [(part,) for part in images.split(64)]


MODELS = {"minilm": minilm, "vgg11": vgg11}


def decomposed(name: str, model: nn.Module, calibration: list[Any], **options: Any) -> Any:
    """The compiled model with blocks, its plan made from the calibration batches."""
    statistics = tdc.calibrate(model, calibration, progress=False)
    budget = BUDGETS[name]
    return torch.compile(
        model, backend="tdc", options={"budget": budget, "statistics": statistics, "strict": True, **options}
    )


def time_rows(name: str, batch: int, repeats: int) -> list[dict[str, object]]:
    model, call, calibration = MODELS[name](batch)
    dense, small = torch.compile(model, backend="inductor"), decomposed(name, model, calibration)
    with torch.no_grad():
        reference, found = call(dense), call(small)
        taken = interleaved({"dense": lambda: call(dense), "tdc": lambda: call(small)}, repeats=repeats)
    report = tdc.report(small)
    lost = float((found - reference).double().square().sum() / reference.double().square().sum())
    return [
        {
            "model": name,
            "batch": batch,
            "budget": BUDGETS[name],
            "keep_params": round(report.after.params / report.before.params, 4),
            "keep_macs": round(report.after.macs / report.before.macs, 4),
            "replaced": report.replaced,
            "dense_ms": round(1000 * taken["dense"].minimum, 3),
            "tdc_ms": round(1000 * taken["tdc"].minimum, 3),
            "dense_median_ms": round(1000 * taken["dense"].median, 3),
            "tdc_median_ms": round(1000 * taken["tdc"].median, 3),
            "time_ratio": round(taken["tdc"].minimum / taken["dense"].minimum, 4),
            "output_change": f"{lost:.3e}",
        }
    ]


def resident(key: str) -> int:
    """Bytes by the line of /proc/self/status: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) * 1024


def memory_of(name: str, how: str) -> dict[str, object]:
    """In a process of its own: resident bytes after compilation and calls, and the most so far."""
    import gc

    model, call, calibration = MODELS[name](1)
    fast = (
        torch.compile(model, backend="inductor")
        if how == "dense"
        else decomposed(name, model, calibration, release_weights=how == "released")
    )
    with torch.no_grad():
        call(fast)
        gc.collect()
        call(fast)
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    return {"rss": resident("VmRSS"), "peak_rss": resident("VmHWM"), "weights_bytes": held}


def memory_rows(name: str) -> list[dict[str, object]]:
    rows = []
    for how in ("dense", "kept", "released"):
        command = [sys.executable, __file__, name, "--memory", how]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        values = (int(part) for part in run.stdout.split()[-3:])
        row = dict(zip(("rss_bytes", "peak_rss_bytes", "weights_bytes"), values, strict=True))
        rows.append({"model": name, "memory": how, "budget": BUDGETS[name], **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--memory", choices=("dense", "kept", "released"), help="print the memory of one way and stop")
    parser.add_argument("--smoke", action="store_true", help="a short run that writes nothing")
    given = parser.parse_args()
    if given.memory:
        print(*memory_of(given.models[0], given.memory).values())
        return
    rows: list[dict[str, object]] = []
    for name in given.models:
        for batch in (1,) if given.smoke else (1, 16):
            rows += time_rows(name, batch, 5 if given.smoke else 25)
        rows += [] if given.smoke else memory_rows(name)
    for row in rows:
        print(row)
    if not given.smoke:
        write_rows("compile", rows)


if __name__ == "__main__":
    main()
