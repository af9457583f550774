"""Compiled models: decomposed by the backend ``tdc`` against dense by Inductor, in turn; their memory; how long calls
take while a model is planned and compiled in the background; and what the check for changed weights costs.

``python benchmarks/bench_compile.py [minilm] [vgg11]``; ``--smoke`` for a short run that writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch
from common import write_rows
from torch import Tensor, nn

import tdc
from tdc import _background, _parts
from tdc.ir import Candidate
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


def latency_row(name: str, inner: str) -> dict[str, object]:
    """Milliseconds of dense calls of one example: alone, beside a thread that runs Python without pause, and while TDC
    plans, fits, compiles and changes over. The last two with the switch interval that TDC sets.
    """
    model, call, calibration = MODELS[name](1)
    dense = torch.compile(model, backend=inner)
    options: dict[str, Any] = {"budget": BUDGETS[name], "calibrate_calls": CALLS, "inner": inner}
    fast = torch.compile(model, backend="tdc", options=options)
    ending = threading.Event()

    def busy() -> None:
        while not ending.is_set():
            pass

    def timed(compiled: Any, going: Callable[[], bool]) -> list[float]:
        taken = []
        while going():
            start = time.perf_counter()
            call(compiled)
            taken.append(1000 * (time.perf_counter() - start))
        return taken

    with torch.no_grad():
        call(dense)
        alone = timed(dense, _for_seconds(5))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_background.SWITCH)
        threading.Thread(target=busy).start()
        beside = timed(dense, _for_seconds(5))
        ending.set()
        sys.setswitchinterval(interval)
        for batch in calibration:
            fast(**batch) if isinstance(batch, dict) else fast(*batch)
        for _ in range(3):
            call(fast)
        done = [part.done for part in _parts.parts()][-1]
        began = time.monotonic()
        planning = timed(fast, lambda: not done.is_set())
    return {
        "model": name,
        "latency": inner,
        "background_s": round(time.monotonic() - began, 1),
        "alone_median_ms": round(median(alone), 2),
        "alone_worst_ms": round(max(alone), 2),
        "busy_median_ms": round(median(beside), 2),
        "busy_worst_ms": round(max(beside), 2),
        "planning_median_ms": round(median(planning), 2),
        "planning_p99_ms": round(quantiles(planning, n=100)[-1], 2),
        "planning_worst_ms": round(max(planning), 2),
    }


def _for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def check_row() -> dict[str, object]:
    """What a call of a graph with 100 replaced weights costs beside what it runs."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(100))).eval()
    plan = tdc.plan(model, torch.randn(1, 4), budget="params=1.0", progress=False)
    choices = tuple(Candidate(choice.site, "svd", ranks=(("r", 4),)) for choice in plan.choices)
    plan = replace(plan, choices=choices)
    options: dict[str, Any] = {"plan": plan, "inner": "eager", "strict": True}
    fast = torch.compile(model, backend="tdc", options=options)
    with torch.no_grad():
        fast(torch.randn(1, 4))
        instance = next(iter(_parts.parts()[-1].instances))
        instance.active = replace(instance.active, run=lambda args: None)
        args = instance.arguments([torch.randn(1, 4)])
        taken = interleaved({"check": lambda: instance.graph(*args)}, repeats=300)["check"]
    found = {"check_min_us": round(1e6 * taken.minimum, 1), "check_median_us": round(1e6 * taken.median, 1)}
    return {"model": "100 linear layers", **found}


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
    memory = {"rss_bytes": resident("VmRSS"), "peak_rss_bytes": resident("VmHWM"), "weights_bytes": held}
    return {"model": name, "memory": how, "budget": BUDGETS[name], **memory}


def in_a_process_of_its_own(name: str, *how: str) -> dict[str, object]:
    """The row that this script prints last when called so, with no compiled code of earlier runs at hand."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, name, *how]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return row


def memory_rows(name: str) -> list[dict[str, object]]:
    return [in_a_process_of_its_own(name, "--memory", how) for how in ("dense", "kept", "released")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--memory", choices=("dense", "kept", "released"), help="print the memory of one way and stop")
    parser.add_argument("--latency", choices=("eager", "inductor"), help="time calls while planning and stop")
    parser.add_argument("--smoke", action="store_true", help="a short run that writes nothing")
    given = parser.parse_args()
    if given.memory or given.latency:
        (name,) = given.models
        print(json.dumps(memory_of(name, given.memory) if given.memory else latency_row(name, given.latency)))
        return
    rows: list[dict[str, object]] = []
    for name in given.models:
        for batch in (1,) if given.smoke else (1, 16):
            rows += time_rows(name, batch, 5 if given.smoke else 25)
        if not given.smoke:
            rows += memory_rows(name)
            rows += [in_a_process_of_its_own(name, "--latency", inner) for inner in ("eager", "inductor")]
    rows.append(check_row())
    for row in rows:
        print(row)
    if not given.smoke:
        write_rows("compile", rows)


if __name__ == "__main__":
    main()
