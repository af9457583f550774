"""What each part of planning and fitting brings to the accuracy, at equal budgets.

    python benchmarks/bench_accuracy.py vgg11 | minilm | smollm2 [--parts ...] [--budgets ...] [--draw 0]

`input`: planned and fitted in the metric of the inputs. `fisher`: in that of the output gradients too. `anchored`: each
layer fitted on what the layers before it, already cut, give. `healed`: then trained, without labels.
Of `fisher` one thing less each: `uniform` (the same keep everywhere), `no hidden` (all units between layers stay),
`no pivoted` (formats without gathers), `no joint` (inputs that layers share are not made use of), `no bias` (the mean
of an error does not go into the bias); `anchored no hidden`: of `anchored`.

Three disjoint parts of the data each time. VGG11: training images 0 to 8191 for the statistics and fits (draws 1 and
2: 8192 to 16383, 24576 to 32767), all but 20000 to 20511 for healing, those for the sensitivities, the 5,000
development images to measure on. MiniLM: sentences of ``tdc demo``, 2,048, 64 and 512; to the first part come those of
the docstrings of the other modules of Python's library (2,683 in Python 3.11), for healing also those of torch and
numpy (3,549). SmolLM2: windows of WikiText-2's validation part, 0 to 23 and 108 to 131 (draws 1 and 2: 60 to 83 and
132 to 155, 84 to 107 and 156 to 179; for healing all but the following), the first 128 tokens of 24 to 27, and 40 to
59; `elsewhere`: perplexity on text of another domain, docstrings of Python's standard library, over the dense one.
`--statistics`: kept in that file, or read from it; `--models`: what `anchored` gives is kept in that folder, `healed`
starts from it, and goes on there after an interruption. `--epochs`: of healing, at most.

Rows are added to results/accuracy.csv, in place of earlier ones of the same model, part, budget and draw.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import read_rows, shared_data, write_rows
from torch import nn
from vgg import cifar, hits, load_vgg11, mcnemar

import tdc
from tdc.passes.propose_joint import ProposeJoint

NAME = "accuracy"
KEYS = ("model", "part", "budget", "draw")
GATHERLESS = ("svd", "output_svd", "input_svd", "spatial_svd", "tucker2")
PARTS: dict[str, dict[str, Any]] = {
    "input": {"metric": "input"},
    "fisher": {},
    "anchored": {"calibrated": True},
    "healed": {"calibrated": True, "healed": True},
    "uniform": {"allocation": "uniform"},
    "no hidden": {"allow": ("pivoted", *GATHERLESS)},
    "anchored no hidden": {"allow": ("pivoted", *GATHERLESS), "calibrated": True},
    "no pivoted": {"allow": ("interpolative", *GATHERLESS)},
    "no joint": {"joint": False},
    "no bias": {"bias": False},
}
BUDGETS = {
    "vgg11": ("params=0.2", "params=0.1", "params=0.05", "params=0.03", "macs=0.5", "macs=0.25", "macs=0.1"),
    "minilm": ("params=0.8", "params=0.6", "params=0.4"),
    "smollm2": ("params=0.9", "params=0.8", "params=0.6"),
}


class Vgg11:
    heal = tdc.Heal(epochs=6)

    def __init__(self, draw: int = 0) -> None:
        self.model: nn.Module = load_vgg11()
        start = (0, 8192, 24576)[draw]
        self.calibration: Any = list(cifar("train", 8192, start)[0].split(256))
        self.probe: Any = list(cifar("train", 512, 20000)[0].split(256))
        rest = (cifar("train", 20000)[0], cifar("train", start=20512)[0])
        self.healing: Any = list(torch.cat(rest).split(256))
        self._data = cifar("dev")
        self._dense = hits(self.model, *self._data)

    def measured(self, small: nn.Module) -> dict[str, str]:
        right = hits(small, *self._data)
        lost = 100 * float(self._dense.float().mean() - right.float().mean())
        against = f"{lost:.2f} points lost (McNemar {mcnemar(self._dense, right):.2g})"
        return {"accuracy": f"{100 * float(right.float().mean()):.2f}", "against dense": against}


class MiniLM:
    heal = tdc.Heal(epochs=6, examples=16)

    def __init__(self, draw: int = 0) -> None:
        from tdc.demo import Encoder, load_minilm, sentences

        self.model, tokenizer = load_minilm()
        self.encoder, texts = Encoder(tokenizer), sentences()
        shuffled = [texts[k] for k in torch.randperm(len(texts)).tolist()]
        if draw:
            raise SystemExit("skipped: there are sentences for one draw only")
        library, others = (sorted({*sentences(names)} - {*texts}) for names in other_modules())
        parts = ([*shuffled[:2048], *library], shuffled[2048:2112], shuffled[2112:2624])
        self.calibration, self.probe, self._held_out = (self.encoder.batches(part) for part in parts)
        self.healing = [*self.calibration, *self.encoder.batches(others)]
        self._reference = self.encoder.of_module(self.model, self._held_out)

    def measured(self, small: nn.Module) -> dict[str, str]:
        cosine = (self.encoder.of_module(small, self._held_out) * self._reference).sum(-1)
        return {"accuracy": f"{cosine.mean():.4f}", "against dense": f"5 % below {cosine.quantile(0.05):.4f}"}


class SmolLM2:
    heal = tdc.Heal(epochs=1, examples=1)

    def __init__(self, draw: int = 0) -> None:
        from bench_smollm2 import WINDOW, load, perplexity

        self.model, tokenizer = load()
        ids = torch.tensor(tokenizer(shared_data("wikitext2_valid.txt").read_text()).input_ids)
        windows = [ids[k * WINDOW : (k + 1) * WINDOW][None] for k in range(len(ids) // WINDOW)]
        first, more = (0, 60, 84)[draw], 108 + 24 * draw
        own = [*windows[first : first + 24], *windows[more : more + 24]]
        self.calibration = [{"input_ids": w, "use_cache": False} for w in own]
        others = [*windows[:24], *windows[28:40], *windows[60:]]
        halves = torch.cat(others).reshape(-1, WINDOW // 2)
        self.healing = [{"input_ids": half[None], "use_cache": False} for half in halves]
        self.probe = [{"input_ids": torch.cat([w[:, :128] for w in windows[24:28]]), "use_cache": False}]
        self._held_out, self._perplexity = windows[40:60], perplexity
        other = torch.tensor(tokenizer(docstrings()).input_ids)
        self._elsewhere = [other[k * WINDOW : (k + 1) * WINDOW][None] for k in range(8)]
        self._dense = [perplexity(self.model, part) for part in (self._held_out, self._elsewhere)]

    def measured(self, small: nn.Module) -> dict[str, str]:
        found, other = (self._perplexity(small, part) for part in (self._held_out, self._elsewhere))
        return {
            "accuracy": f"{found:.3f}",
            "against dense": f"{found / self._dense[0]:.4f} times the perplexity",
            "elsewhere": f"{other / self._dense[1]:.4f}",
        }


def other_modules() -> tuple[list[str], list[str]]:
    """Names of the other modules of Python's library, and of those of torch and numpy."""
    library = {name for name in sys.stdlib_module_names if name[0] != "_"} - {"antigravity", "idlelib", "this"}
    folders = ("torch", "torch.nn", "torch.nn.modules", "torch.distributions", "torch.optim", "numpy")
    inner = [
        f"{folder}.{entry.name}"
        for folder in folders
        for entry in pkgutil.iter_modules(importlib.import_module(folder).__path__)
        if entry.name[0] != "_"
    ]
    return sorted(library), [*folders, *inner]


def docstrings() -> str:
    """Those of modules of Python's standard library, in order of their names: English of another domain."""
    names = ("argparse", "asyncio.events", "collections", "decimal", "difflib", "email.message", "fractions", "heapq")
    names += ("ipaddress", "json", "logging", "optparse", "pathlib", "pickle", "random", "statistics", "subprocess")
    found = []
    for name in names:
        module = importlib.import_module(name)
        things = [module, *(value for _, value in sorted(vars(module).items()) if isinstance(value, type))]
        things += [v for thing in things[1:] for _, v in sorted(vars(thing).items()) if callable(v)]
        found += [text for thing in things if (text := inspect.getdoc(thing))]
    return "\n\n".join(dict.fromkeys(found))


CASES: dict[str, Any] = {"vgg11": Vgg11, "minilm": MiniLM, "smollm2": SmolLM2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["input", "fisher", "anchored", "healed"])
    parser.add_argument("--budgets", nargs="*")
    parser.add_argument("--draw", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--epochs", type=int)
    given = parser.parse_args()
    torch.manual_seed(0)
    case = CASES[given.model](given.draw)
    case.heal = replace(case.heal, epochs=given.epochs or case.heal.epochs)
    fronts: dict[str, tuple[tdc.Statistics, Any, float]] = {}
    for part in given.parts:
        how = PARTS[part]
        metric = how.get("metric", "fisher")
        file = given.statistics if metric == "fisher" else None
        statistics, seconds = statistics_of(case, given.model, metric, file)
        if not how.get("bias", True):
            statistics = replace(
                statistics, sites=tuple(replace(e, site=replace(e.site, bias=False)) for e in statistics.sites)
            )
        options = {key: how[key] for key in ("allow", "allocation") if key in how}
        start = time.perf_counter()
        key = str((metric, options, how.get("joint"), how.get("bias")))
        if key not in fronts:
            unshared = patch.object(ProposeJoint, "run", lambda self, unit: unit)
            with nullcontext() if how.get("joint", True) else unshared:
                budgets = given.budgets or BUDGETS[given.model]
                front = tdc.pareto(case.model, case.calibration[0], budgets=budgets, statistics=statistics, **options)
            fronts[key] = statistics, front, time.perf_counter() - start
        statistics, front, planned = fronts[key]
        for plan in front:
            start = time.perf_counter()
            kept = given.models and given.models / f"{given.model} anchored {plan.budget} {given.draw}.pt"
            small = compressed(case, plan, statistics, how, kept)
            if part == "anchored" and kept:
                torch.save(small, kept)
            row = {
                "model": given.model,
                "part": part,
                "budget": plan.budget,
                "draw": str(given.draw),
                **case.measured(small),
                "predicted loss": f"{plan.loss:.4g}",
                "calibrate s": f"{seconds:.0f}",
                "plan s": f"{planned:.0f}",
                "fit s": f"{time.perf_counter() - start:.0f}",
                "peak GB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}",
                "note": "; ".join(r.reason for r in tdc.report(small).remarks if r.stage == "heal"),
            }
            print(row, flush=True)
            others = [old for old in read_rows(NAME) if any((old.get(key) or "0") != row[key] for key in KEYS)]
            write_rows(NAME, [*others, row])  # a run that is stopped keeps what it found


def compressed(case: Any, plan: tdc.Plan, statistics: tdc.Statistics, how: Any, kept: Path | None) -> nn.Module:
    """Compressed as a part says; where healing can start from what is kept, it does."""
    healed = how.get("healed", False)
    if healed and kept and kept.exists():
        small: nn.Module = torch.load(kept, weights_only=False)
    else:
        calibration = case.calibration if how.get("calibrated") else None
        small = tdc.compress(case.model, case.calibration[0], plan=plan, statistics=statistics, calibration=calibration)
    if not healed:
        return small
    config = replace(case.heal, checkpoint=kept and kept.with_name(f"{kept.stem} healing.safetensors"))
    return tdc.heal(small, case.model, case.healing, config=config)


@cache
def statistics_of(case: Any, name: str, metric: str, file: Path | None) -> tuple[tdc.Statistics, float]:
    """And the seconds that they took."""
    if file is not None and file.exists():
        return tdc.Statistics.load(file), 0.0
    exclude = "pooler.dense" if name == "minilm" else ()
    start = time.perf_counter()
    made = tdc.calibrate(case.model, case.calibration, probe=case.probe, metric=metric, exclude=exclude)
    if file is not None:
        made.save(file)
    return made, time.perf_counter() - start


if __name__ == "__main__":
    main()
