"""The optimizer of healing against Adam, at several rates.

    python benchmarks/bench_healing.py vgg11 | minilm | smollm2 --small FILE [--steps 200] [--rates ...]

`--small`: a model that `bench_accuracy.py --models` kept. Both optimizers take the same steps of the data for healing
from it; `held out`: the divergence of the outputs on steps that neither learns from, before and after. A rate of 0 is
the default one. `seconds` take in everything, the held-out steps too.

Rows are added to results/healing.csv, in place of earlier ones of the same model, small model, optimizer, rate, steps.
"""

from __future__ import annotations

import argparse
import copy
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
KEYS = ("model", "small", "optimizer", "rate", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.0, 1e-4, 2e-4, 4e-4, 1e-3])
    given = parser.parse_args()
    case = CASES[given.model]()
    start = torch.load(given.small, weights_only=False)
    for rate in given.rates:
        for name, optimizer in OPTIMIZERS.items():
            small = copy.deepcopy(start)
            began = time.perf_counter()
            with patch.object(sys.modules["tdc.heal"], "RotatedAdam", optimizer):
                heal(small, case, given.steps, rate)
            remark = next(r.reason for r in reversed(tdc.report(small).remarks) if r.stage == "heal")
            found = re.findall(r"[\d.]+(?:e-?\d+)?", remark.partition("steps: ")[2])
            row = {
                "model": given.model,
                "small": given.small.stem,
                "optimizer": name,
                "rate": f"{rate:g}",
                "steps": str(given.steps),
                "held out": found[0],
                "after": found[1] if "->" in remark else found[0],
                "seconds": f"{time.perf_counter() - began:.0f}",
            }
            print(row, flush=True)
            others = [old for old in read_rows("healing") if any(old.get(key) != row[key] for key in KEYS)]
            write_rows("healing", [*others, row])  # a run that is stopped keeps what it found


def heal(small: Any, case: Any, steps: int, rate: float) -> None:
    """One epoch of so many steps, and a tenth as many held out."""
    examples, batches, left = case.heal.examples, [], round(steps / 0.9)
    for batch in case.healing:
        length = len(batch) if isinstance(batch, torch.Tensor) else len(batch["input_ids"])
        batches.append(batch)
        left -= -(-length // examples)
        if left <= 0:
            break
    tdc.heal(small, case.model, batches, config=tdc.Heal(epochs=1, rate=rate or None, examples=examples))


if __name__ == "__main__":
    main()
