"""How healing goes: the optimizer against Adam, at several rates, with and without what layers read.

    python benchmarks/bench_healing.py vgg11 | minilm | smollm2 --small FILE [--steps 200] [--epochs 1] [--rates ...]
        [--inside 0.9 0] [--optimizers rotated adam]

`--small`: a model that `bench_accuracy.py --models` kept. All runs take the same steps of the data for healing from it;
`held out`: the divergence of the outputs on steps that none learns from, before and after. A rate of 0 is the default
one. `seconds` take in everything but the measurement, which is that of bench_accuracy.py.

Rows are added to results/healing.csv, in place of earlier ones of the same model, small model and options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench_accuracy import CASES
from common import read_rows, write_rows

import tdc
from tdc.optimizer import RotatedAdam


def adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


OPTIMIZERS = {"rotated": RotatedAdam, "adam": adam}
KEYS = ("model", "small", "optimizer", "inside", "rate", "steps", "epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--inside", type=float, nargs="*", default=[0.9])
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.0, 1e-4, 2e-4, 4e-4, 1e-3])
    given = parser.parse_args()
    case = CASES[given.model]()
    start = torch.load(given.small, weights_only=False)
    for rate, inside, name in itertools.product(given.rates, given.inside, given.optimizers):
        small = copy.deepcopy(start)
        config = tdc.Heal(epochs=given.epochs, rate=rate or None, examples=case.heal.examples, inside=inside)
        began = time.perf_counter()
        with patch.object(sys.modules["tdc.heal"], "RotatedAdam", OPTIMIZERS[name]):
            tdc.heal(small, case.model, first_batches(case, given.steps), config=config)
        seconds = time.perf_counter() - began
        remark = next(r.reason for r in reversed(tdc.report(small).remarks) if r.stage == "heal")
        found = re.findall(r"[\d.]+(?:e-?\d+)?", remark.partition("steps: ")[2])
        row = {
            "model": given.model,
            "small": given.small.stem,
            "optimizer": name,
            "inside": f"{inside:g}",
            "rate": f"{rate:g}",
            "steps": str(given.steps),
            "epochs": str(given.epochs),
            "held out": found[0],
            "after": found[1] if "->" in remark else found[0],
            "seconds": f"{seconds:.0f}",
            **{key: value for key, value in case.measured(small).items() if key != "accuracy"},
        }
        print(row, flush=True)
        others = [old for old in read_rows("healing") if any(old.get(key) != row[key] for key in KEYS)]
        write_rows("healing", [*others, row])  # a run that is stopped keeps what it found


def first_batches(case: Any, steps: int) -> list[Any]:
    """Batches for healing that make so many steps, and a tenth as many that are held out."""
    examples, batches, left = case.heal.examples, [], round(steps / 0.9)
    for batch in case.healing:
        length = len(batch) if isinstance(batch, torch.Tensor) else len(batch["input_ids"])
        batches.append(batch)
        left -= -(-length // examples)
        if left <= 0:
            break
    return batches


if __name__ == "__main__":
    main()
