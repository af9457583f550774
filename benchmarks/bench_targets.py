"""Choices by predicted time against the best of what was measured.

    python benchmarks/bench_targets.py [--seconds 120] [--table FILE] [--save FILE]

Layers of real networks, on shapes that are not in the table: each as it is, and with the default formats at three
sizes. All of a layer are timed in turn by the stopwatch of budgets of time (cold weights, least time of three
runs, minutes apart).
Three clocks
predict: ``table``, the times of this machine, measured for so many seconds before the layers are; ``description``, the
roofline of generic-cpu alone; ``macs``, multiply-adds. At each size the planner would take what a clock calls fastest,
dense or one of the formats: ``regret`` is the time of that choice over the least time of the choices (mean and worst of
the three sizes). ``mape``: mean absolute error of the predicted over the measured time; ``tau``: Kendall's rank
correlation, over all candidates of a layer. Rows go to results/targets.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from common import write_rows
from torch import Tensor, nn

from tdc import decompositions, targets
from tdc.frontends.nn.program import NnProgram
from tdc.frontends.nn.timing import Stopwatch
from tdc.ir import DENSE, Block, Candidate, Site
from tdc.passes._seconds import site_seconds
from tdc.passes.propose_layouts import lowered
from tdc.planning.cost import dense_cost
from tdc.planning.seconds import Clock, Estimate
from tdc.targets import _table
from tdc.targets._measure import measure

SIZES = (0.7, 0.5, 0.25)
RUNS = 3
LINEAR = (
    ("MiniLM query", 384, 384, 512),
    ("MiniLM up", 384, 1536, 512),
    ("MiniLM down", 1536, 384, 512),
    ("MiniLM up, one sentence", 384, 1536, 24),
    ("BERT up", 768, 3072, 1),
    ("BERT up", 768, 3072, 24),
    ("BERT up", 768, 3072, 200),
    ("BERT down", 3072, 768, 24),
    ("BERT query", 768, 768, 200),
    ("SmolLM2 gate", 576, 1536, 1),
    ("SmolLM2 gate", 576, 1536, 128),
    ("SmolLM2 down", 1536, 576, 1),
    ("ragged", 1100, 900, 1),
    ("ragged", 1100, 900, 50),
    ("ResNet head", 2048, 1000, 12),
)
"""Name, inputs, outputs, rows."""
CONV = (
    ("VGG11 2", 64, 128, (3, 3), 16, 16, 1),
    ("VGG11 4", 256, 256, (3, 3), 8, 16, 1),
    ("VGG11 6", 512, 512, (3, 3), 4, 16, 1),
    ("VGG11 8", 512, 512, (3, 3), 2, 16, 1),
    ("VGG11 4, one image", 256, 256, (3, 3), 8, 1, 1),
    ("ResNet 2", 64, 64, (3, 3), 56, 1, 1),
    ("ResNet 3", 128, 128, (3, 3), 28, 1, 1),
    ("ResNet 4", 256, 256, (3, 3), 14, 1, 1),
    ("ResNet 3, stride", 64, 128, (3, 3), 56, 1, 2),
    ("ResNet50 expand", 128, 512, (1, 1), 28, 1, 1),
    ("ResNet50 reduce", 1024, 256, (1, 1), 14, 1, 1),
    ("large window", 48, 96, (5, 5), 20, 4, 1),
)
"""Name, inputs, outputs, window, side of the image, examples, stride."""


@dataclass(frozen=True)
class Case:
    name: str
    module: nn.Module
    example: Tensor
    work: str


def cases() -> list[Case]:
    made = [Case(n, nn.Linear(i, o), torch.randn(rows, i), f"{i}->{o}, {rows} rows") for n, i, o, rows in LINEAR]
    for name, i, o, window, side, examples, stride in CONV:
        module = nn.Conv2d(i, o, window, stride, tuple(size // 2 for size in window))
        work = f"{i}->{o} {window[0]}x{window[1]}{'/2' * (stride > 1)}, {examples} x {side}x{side}"
        made.append(Case(name, module, torch.randn(examples, i, side, side), work))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--table", help="use this table instead of measuring one")
    parser.add_argument("--save", help="keep the table in this file")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    table = _table.load(chosen.table) if chosen.table else measure(chosen.seconds, progress=True)
    if chosen.save:
        _table.save(table, chosen.save)
    machine = targets.get("cpu").machine
    assert machine is not None
    clocks = {"table": Clock(machine, table), "description": Clock(machine)}
    trials = [Trial(case) for case in cases()]
    for _ in range(RUNS):
        for trial in trials:
            trial.run()
    rows = [row for trial in trials for row in judged(trial, clocks)]
    for clock in (*clocks, "macs"):
        rows.append(summary([row for row in rows if row["clock"] == clock], clock))
    head = {"table": table.key, "table points": len(table.timings), "drift": table.drift, "noisy": table.noisy}
    write_rows("targets", [{**row, **head} for row in rows])


class Trial:
    """A layer with its candidates, and the least seconds of each in all runs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.program = NnProgram(nn.Sequential(case.module).eval(), case.example)
        (self.site,), _ = self.program.sites()
        with torch.no_grad():
            rows = case.module(case.example).numel() / self.site.axes["o"] / self.site.axes.get("g", 1)
        dense = Candidate(self.site, DENSE)
        self.dense = replace(dense, dense_cost=dense_cost(self.site, rows))
        self.sizes = [candidates(self.site, self.dense, keep) for keep in SIZES]
        self.options = [self.dense, *itertools.chain(*self.sizes)]
        self.least = [float("inf")] * len(self.options)

    def run(self) -> None:
        blocks = [lowered(targets.get("cpu"), c)[1] for c in self.options[1:]]
        watch = self.program.stopwatch([self.site])
        assert isinstance(watch, Stopwatch)
        found = watch.site(self.site, [block for block in blocks if isinstance(block, Block)])
        self.least = [min(pair) for pair in zip(self.least, found, strict=True)]


def judged(trial: Trial, clocks: dict[str, Clock]) -> list[dict[str, object]]:
    """A row for each clock."""
    case, dense, sizes, options, measured = trial.case, trial.dense, trial.sizes, trial.options, trial.least
    times = dict(zip(map(key, options), measured, strict=True))
    target, made = targets.get("cpu"), []
    for name, tell in (*((n, clock_of(c, target)) for n, c in clocks.items()), ("macs", by_macs(target))):
        told = [tell(c) for c in options]
        guess = dict(zip(map(key, options), (e.seconds for e in told), strict=True))
        regrets = [regret([key(dense), *map(key, own)], guess, times) for own in sizes if own]
        errors = [abs(guess[k] / times[k] - 1) for k in times]
        labels = [e.label for e in told]
        assert "measured" not in labels, f"{case.name} has a layer that is in the table"
        row = {
            "clock": name,
            "layer": case.name,
            "work": case.work,
            "candidates": len(options),
            "regret": f"{statistics.mean(regrets):.3f}",
            "worst regret": f"{max(regrets):.3f}",
            "mape": f"{statistics.mean(errors):.3f}" if name != "macs" else "",
            "tau": f"{kendall([guess[k] for k in times], [times[k] for k in times]):.3f}",
            "interpolated": f"{sum(label != 'modelled' for label in labels) / len(labels):.2f}",
            "dense, us": f"{1e6 * measured[0]:.1f}",
        }
        made.append(row)
        print("  ".join(f"{value}" for value in row.values()), flush=True)
    return made


def candidates(site: Site, dense: Candidate, keep: float) -> list[Candidate]:
    """Of every default format that can, the ranks that keep just less than this part of the parameters."""
    found = []
    for decomposition in (decompositions.get(name) for name in decompositions.names()):
        for variant in decomposition.variants(site.axes) if decomposition.by_default else ():
            full = decomposition.full_ranks(site.axes, variant)
            step = targets.get("cpu").rank_step(min(full.values()))
            best: tuple[int, dict[str, int]] | None = None
            for ranks in decomposition.rank_lattice(site.axes, step, variant):
                params = decomposition.layout(site.axes, ranks, variant).params
                if params <= keep * site.params and (best is None or params > best[0]):
                    best = params, dict(ranks)
            if best is not None and best[0] > 0.8 * keep * site.params:
                c = replace(dense, decomposition=decomposition.name, variant=variant, ranks=tuple(best[1].items()))
                if isinstance(lowered(targets.get("cpu"), c)[1], Block):
                    found.append(c)
    return found


def key(candidate: Candidate) -> tuple[object, ...]:
    return candidate.decomposition, candidate.variant, candidate.ranks


def clock_of(clock: Clock, target: targets.Target) -> Callable[[Candidate], Estimate]:
    return lambda candidate: site_seconds(clock, target, candidate)


def by_macs(target: targets.Target) -> Callable[[Candidate], Estimate]:
    """Multiply-adds in place of seconds."""

    def tell(candidate: Candidate) -> Estimate:
        if candidate.decomposition == DENSE:
            return Estimate(prod(candidate.site.matrix), "modelled")
        block = lowered(target, candidate)[1]
        assert isinstance(block, Block)
        strides = {window.axis: float(window.stride) for window in candidate.site.windows}
        return Estimate(block.macs_at(strides), "modelled")

    return tell


def regret(options: Sequence[object], guess: dict, times: dict) -> float:
    return float(times[min(options, key=guess.__getitem__)] / min(times[o] for o in options))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Of all pairs, those in the same order less those in the other one, as a part of all."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    score = sum(((a[i] > a[j]) - (a[i] < a[j])) * ((b[i] > b[j]) - (b[i] < b[j])) for i, j in pairs)
    return score / max(len(pairs), 1)


def summary(rows: Sequence[dict[str, object]], clock: str) -> dict[str, object]:
    def numbers(name: str) -> list[float]:
        return [float(str(row[name])) for row in rows if row[name] != ""]

    row: dict[str, object] = {
        "clock": clock,
        "layer": "all",
        "work": f"{len(rows)} layers",
        "candidates": sum(int(str(row["candidates"])) for row in rows),
        "regret": f"{statistics.mean(numbers('regret')):.3f}",
        "worst regret": f"{max(numbers('worst regret')):.3f}",
        "mape": f"{statistics.mean(numbers('mape')):.3f}" if numbers("mape") else "",
        "tau": f"{statistics.mean(numbers('tau')):.3f}",
        "interpolated": f"{statistics.mean(numbers('interpolated')):.2f}",
    }
    print("  ".join(f"{value}" for value in row.values()), flush=True)
    return row


if __name__ == "__main__":
    main()
