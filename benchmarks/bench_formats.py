"""Formats one by one and all together: accuracy against measured time, and what their fits take.

    python benchmarks/bench_formats.py vgg11 [--formats cp tt_conv ...]
    python benchmarks/bench_formats.py minilm [--formats monarch ...]
    python benchmarks/bench_formats.py memory [--formats ...]
    python benchmarks/bench_formats.py front

`vgg11`: CIFAR-10 without labels and gradient steps; training images 0 to 4095 for the statistics, 20000 to 20255 for
the sensitivities, the 5,000 development images to measure on. `minilm`: sentences of ``tdc demo``, 512 for the
statistics, 32 for the sensitivities, 256 to measure on, all disjoint. A format is given alone (the small layers that it
has no form for stay dense); `all` lets every one compete. Times: one thread, dense and compressed in turn, 25 repeats.
`memory`: the peak of a fit at half of the parameters in a process of its own, beyond what the weight and the second
moment take. `front` marks the rows that no other one beats in accuracy and time, and draws them.

Rows are added to results/formats.csv, in place of earlier ones of the same model, format and budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor

import tdc
from tdc import decompositions
from tdc.ir import DENSE, Metric
from tdc.measure import interleaved

NAME = "formats"
KEYS = ("model", "format", "budget")
BUDGETS = {"vgg11": ("params=0.5", "params=0.2", "params=0.1"), "minilm": ("params=0.8", "params=0.6", "params=0.4")}
LONGEST = 600
"""Seconds after which a fit is stopped."""
SIZES = {"linear": {"o": 4096, "i": 4096}, "conv": {"g": 1, "o": 512, "i": 512, "p": 3, "q": 3}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vgg11", "minilm", "memory", "front"))
    parser.add_argument("--formats", nargs="*", help="default: every one that has a form for the model's layers")
    parser.add_argument("--budgets", nargs="*")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.fit:
        print(json.dumps(fitted(*given.fit)))
    elif given.what == "front":
        front()
    elif given.what == "memory":
        memory(given.formats or decompositions.names())
    else:
        kind = "convolution" if given.what == "vgg11" else "linear"
        known = [n for n in decompositions.names() if kind in decompositions.get(n).layers]
        models(given.what, given.formats or [*known, "all"], given.budgets or BUDGETS[given.what])


def models(name: str, formats: list[str], budgets: list[str] | tuple[str, ...]) -> None:
    case: Vgg11 | MiniLM = Vgg11() if name == "vgg11" else MiniLM()
    for format_name in formats:
        start = time.perf_counter()
        try:
            front = tdc.pareto(
                case.model,
                case.example,
                budgets=budgets,
                statistics=case.statistics,
                allow=format_name,
                progress=False,
            )
        except tdc.TdcError as error:
            add({"model": name, "format": format_name, "budget": budgets[0], "note": str(error)[:200]})
            continue
        planned = time.perf_counter() - start
        for remark in front.remarks:
            print(format_name, remark, flush=True)
        for plan in front:
            start = time.perf_counter()
            small = tdc.compress(case.model, case.example, plan=plan, statistics=case.statistics, progress=False)
            fitted = time.perf_counter() - start
            report = tdc.report(small)
            ran = [site.decomposition for site in report.sites if site.decomposition != DENSE]
            add(
                {
                    "model": name,
                    "format": format_name,
                    "budget": plan.budget,
                    "sites": report.replaced,
                    "params kept": f"{report.after.params / report.before.params:.4f}",
                    "macs kept": f"{report.after.macs / report.before.macs:.4f}",
                    **case.measured(small),
                    "plan s": f"{planned:.0f}",
                    "fit s": f"{fitted:.0f}",
                    "chosen": " ".join(f"{n}:{ran.count(n)}" for n in sorted(set(ran))),
                }
            )


class Vgg11:
    def __init__(self) -> None:
        from vgg import cifar, load_vgg11

        self.model = load_vgg11()
        calibration, probe = cifar("train", 4096)[0], cifar("train", 256, 20000)[0]
        self.images, self.labels = cifar("dev")
        self.example: Any = (self.images[:16].contiguous(),)
        self.statistics = tdc.calibrate(self.model, list(calibration.split(256)), probe=[probe], progress=False)

    def measured(self, small: Any) -> dict[str, object]:
        from vgg import accuracy

        (batch,) = self.example
        return {
            "accuracy": f"{accuracy(small, self.images, self.labels):.2f}",
            **speed(lambda: self.model(batch), lambda: small(batch)),
        }


class MiniLM:
    def __init__(self) -> None:
        from tdc.demo import Encoder, load_minilm, sentences

        self.model, tokenizer = load_minilm()
        self.encoder, texts = Encoder(tokenizer), sentences()
        shuffled = [texts[k] for k in torch.randperm(len(texts)).tolist()]
        parts = (shuffled[:512], shuffled[512:544], shuffled[544:800])
        calibration, probe, self.held_out = (self.encoder.batches(part) for part in parts)
        self.example: Any = calibration[0]
        self.statistics = tdc.calibrate(self.model, calibration, probe=probe, exclude="pooler.dense", progress=False)
        self.reference = self.encoder.of_module(self.model, self.held_out)

    def measured(self, small: Any) -> dict[str, object]:
        batch = self.held_out[:1]
        cosine = (self.encoder.of_module(small, self.held_out) * self.reference).sum(-1)
        times = speed(lambda: self.encoder.of_module(self.model, batch), lambda: self.encoder.of_module(small, batch))
        return {"accuracy": f"{cosine.mean():.4f}", **times}


@torch.no_grad()
def speed(dense: Any, small: Any) -> dict[str, str]:
    times = interleaved({"dense": dense, "small": small})
    return {
        "speed min": f"{times['dense'].minimum / times['small'].minimum:.3f}",
        "speed median": f"{times['dense'].median / times['small'].median:.3f}",
    }


def add(row: dict[str, object]) -> None:
    """Write the row at once: a run that is stopped keeps what it found."""
    print(row, flush=True)
    kept = [old for old in read_rows(NAME) if any(old.get(key) != row.get(key) for key in KEYS)]
    write_rows(NAME, [*kept, row])


# ---- memory


def memory(formats: list[str] | tuple[str, ...]) -> None:
    for name in formats:
        for kind, axes in SIZES.items():
            for variant in decompositions.get(name).variants(axes):
                for metric in ("weight", "input"):
                    command = [sys.executable, __file__, "memory", "--fit", f"{name}/{variant}", kind, metric]
                    label = {"model": f"fit of {kind} {'x'.join(str(n) for n in axes.values())}", "budget": metric}
                    if reason := decompositions.get(name).too_large(axes, variant):
                        add({**label, "format": f"{name}/{variant}", "note": f"declined: {reason}"})
                        continue
                    try:
                        run = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
                        found = json.loads(run.stdout) if run.returncode == 0 else {"note": run.stderr[-200:]}
                    except subprocess.TimeoutExpired:
                        found = {"note": f"stopped after {LONGEST} s"}
                    add({**label, "format": f"{name}/{variant}" if variant else name, **found})


def fitted(which: str, kind: str, metric: str) -> dict[str, object]:
    import resource

    name, _, variant = which.partition("/")
    d, axes = decompositions.get(name), SIZES[kind]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(tuple(axes.values()) if kind == "linear" else (512, 512, 3, 3), generator=generator).double()
    width = weight[0].numel()
    second: Tensor | None = None
    if metric == "input":
        rows = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
        second = (rows.T @ rows / width).double()
        second = second if kind == "linear" else second[None]
    lattice = d.rank_lattice(axes, 8, variant)
    if not lattice:
        return {"note": "no rank stores less than dense"}
    dense = weight.numel()
    ranks = min(lattice, key=lambda r: abs(d.layout(axes, r, variant).params / dense - 0.5))
    layout = d.layout(axes, ranks, variant)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    factors = d.fit(weight, layout, Metric(metric, second))
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rest = (weight - decompositions.rebuild(factors, layout)).reshape(weight.shape[0], -1)
    lost = rest if second is None else rest @ second.reshape(width, width)
    whole = weight.reshape(weight.shape[0], -1)
    image = whole if second is None else whole @ second.reshape(width, width)
    return {
        "params kept": f"{layout.params / dense:.4f}",
        "error": f"{float((lost * rest).sum() / (image * whole).sum()):.4g}",
        "fit s": f"{taken:.1f}",
        "fit peak MB": f"{peak / 1024:.0f}",
    }


# ---- front


def front() -> None:
    """Which rows of each model no other row beats in accuracy and in speed."""
    rows = read_rows(NAME)
    for row in rows:
        others = [o for o in rows if o["model"] == row["model"] and o is not row and o.get("speed min")]
        if row.get("speed min"):
            row["on the front"] = "" if any(_beats(o, row) for o in others) else "yes"
    write_rows(NAME, rows)
    for model in BUDGETS:
        print(model)
        found = [row for row in rows if row["model"] == model and row.get("speed min")]
        for name in dict.fromkeys(row["format"] for row in found):
            on = [row["budget"] for row in found if row["format"] == name and row["on the front"]]
            print(f"  {name}: {', '.join(on) if on else 'never'}")
    draw(rows)


def _beats(other: dict[str, str], row: dict[str, str]) -> bool:
    pairs = [(float(other[key]), float(row[key])) for key in ("accuracy", "speed min")]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def draw(rows: list[dict[str, str]]) -> None:
    """A picture for the README: one panel for each model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tdc"
    figure, panels = pyplot.subplots(1, len(BUDGETS), figsize=(11, 4.5))
    for panel, model in zip(panels, BUDGETS, strict=True):
        found = [row for row in rows if row["model"] == model and row.get("speed min")]
        for name in dict.fromkeys(row["format"] for row in found):
            points = sorted((float(r["speed min"]), float(r["accuracy"])) for r in found if r["format"] == name)
            style = {"linewidth": 2.5, "color": "black"} if name == "all" else {"linewidth": 1}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        panel.set_title(model)
        panel.set_xlabel("times as fast as dense")
        panel.set_ylabel("accuracy, %" if model == "vgg11" else "cosine with dense")
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "results" / "formats.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
