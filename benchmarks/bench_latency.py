"""Whether a budget of time makes anything slower: forty layers and models, through all doors.

    python benchmarks/bench_latency.py [--only TEXT] [--threads 1 2] [--budget latency=0.75]

The cases are of real architectures; those of one layer have random weights whose singular values fall like 1 / sqrt(k),
since no trained ones are at hand, models their own. Planned under the budget in the metric ``weight``, then dense and
result run in turn, as they are. ``ratio``: dense over result in the same lap, the median, with its 95 % interval from
order statistics. ``outcome``: what was done, or why nothing. A case is slower if the interval lies below 0.98. Rows go
to results/latency.csv, in place of those of the same case.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor, nn

import tdc
from tdc.errors import BudgetError

NAME, KEYS = "latency", ("case", "door", "threads")
SECONDS = 6.0
LAPS = (25, 101)
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    door: str
    make: Callable[[], tuple[nn.Module, Tensor]]


def spectral(module: nn.Module) -> nn.Module:
    """With singular values that fall like 1 / sqrt(k)."""
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and weight is not None:
            matrix = torch.randn(weight.shape[0], weight[0].numel())
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            fallen = (u * (s[0] / torch.arange(1, len(s) + 1) ** 0.5)) @ v
            weight.data.copy_(fallen.reshape(weight.shape) / weight[0].numel() ** 0.5)
    return module.eval()


def linear(outputs: int, inputs: int, rows: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (spectral(nn.Sequential(nn.Linear(inputs, outputs))), torch.randn(rows, inputs))


def conv(before: int, after: int, taps: int, size: int, batch: int, **more: Any) -> Any:
    layer = nn.Conv2d(before, after, taps, padding=taps // 2, **more)
    return lambda: (spectral(nn.Sequential(layer)), torch.randn(batch, before, size, size))


def mlp(width: int, hidden: int, rows: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    layers = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return lambda: (spectral(nn.Sequential(*layers)), torch.randn(rows, width))


def basic_block(width: int, size: int, batch: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def half() -> list[nn.Module]:
        return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

    return lambda: (spectral(nn.Sequential(*half(), *half())), torch.randn(batch, width, size, size))


def vgg11(batch: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        from vgg import cifar, load_vgg11

        return load_vgg11(), cifar("train", batch)[0]

    return make


class Sentences(nn.Module):
    """MiniLM on token numbers alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def minilm(batch: int, tokens: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        from tdc.demo import load_minilm

        return Sentences(load_minilm()[0]).eval(), torch.randint(1000, 20000, (batch, tokens))

    return make


CASES = (
    *(Case(f"MiniLM query 384x384, {n} rows", "module", linear(384, 384, n)) for n in (1, 512)),
    *(Case(f"MiniLM up 1536x384, {n} rows", "module", linear(1536, 384, n)) for n in (1, 512)),
    Case("MiniLM down 384x1536, 512 rows", "module", linear(384, 1536, 512)),
    *(Case(f"ViT-B up 3072x768, {n} rows", "module", linear(3072, 768, n)) for n in (1, 197)),
    Case("ViT-B down 768x3072, 197 rows", "module", linear(768, 3072, 197)),
    *(Case(f"SmolLM2 gate 1536x576, {n} rows", "module", linear(1536, 576, n)) for n in (1, 128)),
    *(Case(f"Llama 1B query 2048x2048, {n} rows", "module", linear(2048, 2048, n)) for n in (1, 16)),
    Case("Llama 7B query 4096x4096, 1 row", "module", linear(4096, 4096, 1)),
    Case("a head of 10 classes 10x512, 16 rows", "module", linear(10, 512, 16)),
    Case("ResNet-18 64x64x3x3 at 56, batch 1", "module", conv(64, 64, 3, 56, 1)),
    Case("ResNet-18 128x128x3x3 at 28, batch 1", "module", conv(128, 128, 3, 28, 1)),
    Case("ResNet-18 256x256x3x3 at 14, batch 1", "module", conv(256, 256, 3, 14, 1)),
    Case("ResNet-18 256x256x3x3 at 14, batch 16", "module", conv(256, 256, 3, 14, 16)),
    Case("ResNet-18 512x512x3x3 at 7, batch 1", "module", conv(512, 512, 3, 7, 1)),
    Case("ResNet-18 64x128x3x3 stride 2 at 56, batch 1", "module", conv(64, 128, 3, 56, 1, stride=2)),
    Case("ResNet-50 256x64x1x1 at 56, batch 1", "module", conv(64, 256, 1, 56, 1)),
    Case("ResNet-50 256x1024x1x1 at 14, batch 1", "module", conv(1024, 256, 1, 14, 1)),
    Case("ResNet-50 512x2048x1x1 at 7, batch 16", "module", conv(2048, 512, 1, 7, 16)),
    Case("ResNet-50 3x64x7x7 stem at 224, batch 1", "module", conv(3, 64, 7, 224, 1, stride=2)),
    Case("MobileNet depthwise 96x3x3 at 56, batch 1", "module", conv(96, 96, 3, 56, 1, groups=96)),
    Case("ResNeXt 256x3x3 in 32 groups at 14, batch 1", "module", conv(256, 256, 3, 14, 1, groups=32)),
    Case("VGG11 on CIFAR-10, batch 1", "module", vgg11(1)),
    Case("VGG11 on CIFAR-10, batch 16", "module", vgg11(16)),
    Case("MiniLM, 8 x 64 tokens", "module", minilm(8, 64)),
    Case("ViT-B perceptron 768-3072-768, 197 rows", "onnx", mlp(768, 3072, 197)),
    Case("ViT-B perceptron 768-3072-768, 1 row", "onnx", mlp(768, 3072, 1)),
    Case("ResNet-18 block of 128 at 28, batch 1", "onnx", basic_block(128, 28, 1)),
    Case("VGG11 on CIFAR-10, batch 1", "onnx", vgg11(1)),
    Case("VGG11 on CIFAR-10, batch 16", "onnx", vgg11(16)),
    Case("MiniLM, 8 x 64 tokens", "onnx", minilm(8, 64)),
    Case("ViT-B perceptron 768-3072-768, 197 rows", "export", mlp(768, 3072, 197)),
    Case("ResNet-18 block of 128 at 28, batch 16", "export", basic_block(128, 28, 16)),
    Case("VGG11 on CIFAR-10, batch 16", "export", vgg11(16)),
    Case("MiniLM, 8 x 64 tokens", "torch.compile", minilm(8, 64)),
    Case("VGG11 on CIFAR-10, batch 16", "torch.compile", vgg11(16)),
)


def through_module(case: Case, budget: str) -> tuple[Run, Run, tdc.Report]:
    model, x = case.make()
    small = tdc.compress(model, x, budget=budget, metric="weight", progress=False)
    return lambda: model(x), lambda: small(x), tdc.report(small)


def through_onnx(case: Case, budget: str) -> tuple[Run, Run, tdc.Report]:
    model, x = case.make()
    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder) / "dense.onnx", Path(folder) / "small.onnx"
        torch.onnx.export(model, (x,), dense, dynamo=True, verbose=False, input_names=["x"], external_data=False)
        report = tdc.compress_onnx(dense, out, budget=budget, metric="weight", progress=False)
        before, after = session(dense), session(out)
    given = {"x": x.numpy()}
    return lambda: before.run(None, given), lambda: after.run(None, given), report


def session(path: Path) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def through_export(case: Case, budget: str) -> tuple[Run, Run, tdc.Report]:
    model, x = case.make()
    program = torch.export.export(model, (x,))
    small = tdc.compress_export(program, budget=budget, metric="weight", progress=False)
    before, after = program.module(), small.module()
    return lambda: before(x), lambda: after(x), tdc.report(small)


def through_compile(case: Case, budget: str) -> tuple[Run, Run, tdc.Report]:
    model, x = case.make()
    options = {"budget": budget, "metric": "weight", "strict": True, "calibrate_calls": 0}
    dense, small = torch.compile(copy.deepcopy(model)), torch.compile(model, backend="tdc", options=options)
    with torch.no_grad():
        dense(x), small(x)
    return lambda: dense(x), lambda: small(x), tdc.report(small)


DOORS = {"module": through_module, "onnx": through_onnx, "export": through_export, "torch.compile": through_compile}


def ratios(dense: Run, small: Run) -> list[float]:
    """Dense over result, lap by lap."""
    found, start = list[float](), time.perf_counter()
    with torch.inference_mode():
        for lap in range(3 + LAPS[1]):
            if lap >= 3 + LAPS[0] and time.perf_counter() - start > SECONDS:
                break
            taken = []
            for run in (dense, small) if lap % 2 else (small, dense):
                begin = time.perf_counter()
                run()
                taken.append(time.perf_counter() - begin)
            first, second = taken if lap % 2 else taken[::-1]
            if lap >= 3:
                found.append(first / second)
    return sorted(found)


def measured(case: Case, budget: str, threads: int) -> dict[str, object]:
    torch.manual_seed(0)
    row: dict[str, object] = {"case": case.name, "door": case.door, "threads": threads, "budget": budget}
    start = time.perf_counter()
    try:
        dense, small, report = DOORS[case.door](case, budget)
    except (BudgetError, tdc.ModelError) as error:
        return {**row, "outcome": f"stays dense: {str(error)[:200]}", "slower": "no"}
    row |= {
        "outcome": f"{report.replaced} of {len(report.sites)} sites",
        "plan s": f"{time.perf_counter() - start:.0f}",
    }
    row["bytes"] = f"{report.after.bytes / report.before.bytes:.3f}"
    row["predicted"] = f"{report.before.seconds / report.after.seconds:.3f}"
    found = ratios(dense, small)
    half = round(0.98 * len(found) ** 0.5)
    low, high = found[max(len(found) // 2 - half, 0)], found[min(len(found) // 2 + half, len(found) - 1)]
    row |= {"ratio": f"{statistics.median(found):.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}", "laps": len(found)}
    return {**row, "slower": "yes" if high < 0.98 else "no"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--budget", default="latency=0.75")
    given = parser.parse_args()
    for threads in given.threads:
        torch.set_num_threads(threads)
        for case in CASES:
            if given.only not in f"{case.name}, {case.door}":
                continue
            row = measured(case, given.budget, threads)
            print(row, flush=True)
            kept = [old for old in read_rows(NAME) if any(old.get(key) != str(row[key]) for key in KEYS)]
            write_rows(NAME, [*kept, row])
    rows = read_rows(NAME)
    slower = [row["case"] for row in rows if row["slower"] == "yes"]
    print(f"{len(rows)} cases, {sum('sites' in row['outcome'] for row in rows)} rewritten, slower: {slower or 'none'}")


if __name__ == "__main__":
    main()
