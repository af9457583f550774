"""What each part of planning and fitting brings to the accuracy, at equal budgets.

    python benchmarks/bench_accuracy.py vgg11 | minilm | smollm2 [--parts input fisher anchored healed] [--budgets ...]

`input`: planned and fitted in the metric of the inputs. `fisher`: in that of the output gradients too. `anchored`: each
layer fitted on what the layers before it, already cut, give. `healed`: then trained on the same data, without labels.
Three disjoint parts of the data each time. VGG11: training images 0 to 8191 for the statistics, fits and healing, 20000
to 20511 for the sensitivities, the 5,000 development images to measure on. MiniLM: sentences of ``tdc demo``, 2,048, 64
and 512. SmolLM2: windows of WikiText-2's validation part, 0 to 23, the first 128 tokens of 24 to 27, and 40 to 59.

Rows are added to results/accuracy.csv, in place of earlier ones of the same model, part and budget.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import read_rows, shared_data, write_rows
from torch import nn

import tdc

NAME = "accuracy"
KEYS = ("model", "part", "budget")
PARTS = ("input", "fisher", "anchored", "healed")
BUDGETS = {
    "vgg11": ("params=0.2", "params=0.1", "params=0.05", "macs=0.25"),
    "minilm": ("params=0.8", "params=0.6", "params=0.4"),
    "smollm2": ("params=0.9", "params=0.8", "params=0.6"),
}


class Vgg11:
    heal = tdc.Heal(epochs=12, rate=2e-4)

    def __init__(self) -> None:
        from vgg import accuracy, cifar, load_vgg11

        self.model: nn.Module = load_vgg11()
        self.calibration: Any = list(cifar("train", 8192)[0].split(256))
        self.probe: Any = list(cifar("train", 512, 20000)[0].split(256))
        self._data, self._accuracy = cifar("dev"), accuracy
        self._dense = self._accuracy(self.model, *self._data)

    def measured(self, small: nn.Module) -> dict[str, str]:
        right = self._accuracy(small, *self._data)
        return {"accuracy": f"{right:.2f}", "against dense": f"{self._dense - right:.2f} points lost"}


class MiniLM:
    heal = tdc.Heal(epochs=12, rate=1e-4, examples=16)

    def __init__(self) -> None:
        from tdc.demo import Encoder, load_minilm, sentences

        self.model, tokenizer = load_minilm()
        self.encoder, texts = Encoder(tokenizer), sentences()
        shuffled = [texts[k] for k in torch.randperm(len(texts)).tolist()]
        parts = (shuffled[:2048], shuffled[2048:2112], shuffled[2112:2624])
        self.calibration, self.probe, self._held_out = (self.encoder.batches(part) for part in parts)
        self._reference = self.encoder.of_module(self.model, self._held_out)

    def measured(self, small: nn.Module) -> dict[str, str]:
        cosine = (self.encoder.of_module(small, self._held_out) * self._reference).sum(-1)
        return {"accuracy": f"{cosine.mean():.4f}", "against dense": f"5 % below {cosine.quantile(0.05):.4f}"}


class SmolLM2:
    heal = tdc.Heal(epochs=3, rate=1e-4, examples=1)

    def __init__(self) -> None:
        from bench_smollm2 import WINDOW, load, perplexity

        self.model, tokenizer = load()
        ids = torch.tensor(tokenizer(shared_data("wikitext2_valid.txt").read_text()).input_ids)
        windows = [ids[k * WINDOW : (k + 1) * WINDOW][None] for k in range(60)]
        self.calibration = [{"input_ids": w, "use_cache": False} for w in windows[:24]]
        self.probe = [{"input_ids": torch.cat([w[:, :128] for w in windows[24:28]]), "use_cache": False}]
        self._held_out, self._perplexity = windows[40:60], perplexity
        self._dense = perplexity(self.model, self._held_out)

    def measured(self, small: nn.Module) -> dict[str, str]:
        found = self._perplexity(small, self._held_out)
        return {"accuracy": f"{found:.3f}", "against dense": f"{found / self._dense:.4f} times the perplexity"}


CASES: dict[str, Any] = {"vgg11": Vgg11, "minilm": MiniLM, "smollm2": SmolLM2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--budgets", nargs="*")
    given = parser.parse_args()
    torch.manual_seed(0)
    case = CASES[given.model]()
    example = case.calibration[0]
    exclude = "pooler.dense" if given.model == "minilm" else ()
    for metric in ("input", "fisher"):
        parts = [part for part in given.parts if (part == "input") == (metric == "input")]
        if not parts:
            continue
        start = time.perf_counter()
        statistics = tdc.calibrate(case.model, case.calibration, probe=case.probe, metric=metric, exclude=exclude)
        calibrated = time.perf_counter() - start
        start = time.perf_counter()
        budgets = given.budgets or BUDGETS[given.model]
        front = tdc.pareto(case.model, example, budgets=budgets, statistics=statistics)
        planned = time.perf_counter() - start
        for plan in front:
            for part in parts:
                more = {} if part in ("input", "fisher") else {"calibration": case.calibration}
                start = time.perf_counter()
                heal = case.heal if part == "healed" else False
                small = tdc.compress(case.model, example, plan=plan, statistics=statistics, heal=heal, **more)
                row = {
                    "model": given.model,
                    "part": part,
                    "budget": plan.budget,
                    **case.measured(small),
                    "predicted loss": f"{plan.loss:.4g}",
                    "calibrate s": f"{calibrated:.0f}",
                    "plan s": f"{planned:.0f}",
                    "fit s": f"{time.perf_counter() - start:.0f}",
                    "note": "; ".join(r.reason for r in tdc.report(small).remarks if r.stage == "heal"),
                }
                print(row, flush=True)
                kept = [old for old in read_rows(NAME) if any(old.get(key) != row[key] for key in KEYS)]
                write_rows(NAME, [*kept, row])  # a run that is stopped keeps what it found


if __name__ == "__main__":
    main()
