"""What the parts of bench_planning.py share: small nets, units with proposed layouts, fits, losses and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import read_rows, write_rows
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc._common import checked_options, new_unit
from tdc.frontends.nn import NnProgram
from tdc.frontends.program import Change
from tdc.ir import Candidate, Plan
from tdc.passes.base import Unit
from tdc.passes.check_error import CheckError
from tdc.passes.fit_factors import FitFactors
from tdc.passes.pipeline import PROPOSING, Pipeline
from tdc.passes.propose_layouts import lowered, metric_name
from tdc.statistics import divergence, logits_among

__all__ = [
    "Case",
    "Fits",
    "Judge",
    "add_row",
    "coarse_loss",
    "digits",
    "figure",
    "known_statistics",
    "minilm",
    "proposed",
    "spearman",
    "statistics_of",
    "vgg11",
]

NAME = "planning"
KEYS = ("experiment", "net", "case")


@dataclass
class Case:
    """A trained net with data in three disjoint parts: for the statistics, for the sensitivities, to measure on."""

    name: str
    model: nn.Module
    calibration: list[Any]
    probe: list[Any]
    held_out: Any
    """A tensor of examples, or batches of the same size."""
    labels: Tensor
    exclude: tuple[str, ...] = ()


class Chain(nn.Module):
    """Five stages with one weight each that TDC may cut, behind a first convolution that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU())
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            nn.Sequential(nn.Linear(256, 128), nn.ReLU()),
            nn.Sequential(nn.Linear(128, 96), nn.ReLU()),
            nn.Sequential(nn.Linear(96, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.first(x))


def digits() -> Case:
    """scikit-learn's 1,797 digits in a random order: 0 to 895 to train and calibrate on, 896 to 1023 for the
    sensitivities, the last 773 to measure on.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order]).float()[:, None] / 16
    labels = torch.from_numpy(found.target[order].astype(np.int64))
    torch.manual_seed(0)
    model = trained(Chain(), images[:896], labels[:896])
    return Case(
        "digits", model, list(images[:896].split(112)), [images[896:1024]], images[1024:], labels[1024:], ("first.*",)
    )


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 30) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


def vgg11(calibration: int = 1024, held_out: int = 256) -> Case:
    """Training images from 0 for the statistics, 20000 to 20255 for the sensitivities, the first of the development
    part to measure on.
    """
    from vgg import cifar, load_vgg11

    images, labels = cifar("dev", held_out)
    return Case(
        "vgg11",
        load_vgg11(),
        list(cifar("train", calibration)[0].split(min(128, calibration // 4))),
        list(cifar("train", 256, 20000)[0].split(128)),
        images,
        labels,
    )


def minilm() -> Case:
    """Sentences of ``tdc demo`` in a random order: 1,024 for the statistics, 64 for the sensitivities, 256 to measure
    on.
    """
    from tdc.demo import Encoder, load_minilm, sentences

    model, tokenizer = load_minilm()
    encoder, texts = Encoder(tokenizer), sentences()
    shuffled = [texts[k] for k in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()]
    parts = (encoder.batches(shuffled[a:b]) for a, b in ((0, 1024), (1024, 1088), (1088, 1344)))
    return Case("minilm", model, *parts, torch.empty(0), ("pooler.dense",))


def known_statistics(case: Case, cache: Path | None) -> tdc.Statistics:
    """Those of the case, from the folder ``cache`` where they are there."""
    count = sum(map(len, case.calibration))
    path = None if cache is None else cache / f"{case.name}-{count}.safetensors"
    if path is not None and path.exists():
        return tdc.Statistics.load(path)
    found = statistics_of(case)
    if path is not None:
        found.save(path)
    return found


def statistics_of(case: Case, seed: int = 0) -> tdc.Statistics:
    return tdc.calibrate(
        case.model, case.calibration, probe=case.probe, exclude=case.exclude, seed=seed, progress=False
    )


def proposed(case: Case, statistics: tdc.Statistics, metric: str = "auto", *, anchors: bool = False) -> Unit:
    """A unit in which the layouts of all sites are proposed; with the calibration data for anchored fits if wanted."""
    options = checked_options("params=0.5", metric, "auto", None, case.exclude, "lagrangian", 0, False)
    program = NnProgram(case.model, case.calibration[0])
    calibration = case.calibration if anchors else None
    return Pipeline(PROPOSING).run(new_unit(program, options, calibration, statistics, None))


def realised(unit: Unit, choices: Sequence[Candidate]) -> dict[int, Change]:
    """The weights that take the place of the sites' once the candidates are fitted, and what their biases take up."""
    plan = Plan(choices=tuple(choices), metric=metric_name(unit), target=unit.target.name)
    done = Pipeline((FitFactors(), CheckError())).run(unit.having(plan=plan))
    assert done.plan is not None
    changes = {}
    for choice in done.plan.choices:
        stored = done.factors.get(choice.site.order)
        if stored is not None:
            like = unit.program.weight(choice.site)
            double = {k: f.double() if f.is_floating_point() else f for k, f in stored.items()}
            rebuilt = decompositions.rebuild(double, lowered(unit.target, choice)[0])
            weight = rebuilt.reshape(like.shape).to(like.dtype)
            changes[choice.site.order] = Change(weight, done.shifts.get(choice.site.order))
    return changes


@dataclass
class Fits:
    """Fits each candidate once, by itself, on what the dense model gives."""

    unit: Unit
    known: dict[Candidate, Change | None] = field(default_factory=dict)

    def of(self, choices: Iterable[Candidate]) -> dict[int, Change]:
        changes = {choice.site.order: self.one(choice) for choice in choices if not choice.is_dense}
        return {order: change for order, change in changes.items() if change is not None}

    def one(self, choice: Candidate) -> Change | None:
        if choice not in self.known:
            self.known[choice] = realised(self.unit.having(anchors=()), [choice]).get(choice.site.order)
        return self.known[choice]


class Judge:
    """What changes of weights lose on some data: the divergence of the outputs from those of the dense model."""

    def __init__(self, unit: Unit, data: Any, size: int = 256) -> None:
        parts = list(data.split(size)) if isinstance(data, Tensor) else data
        lengths = [len(part) if isinstance(data, Tensor) else 1 for part in parts]
        self.unit, self.shares = unit, [length / sum(lengths) for length in lengths]
        self.batches = list(unit.program.batches(parts))
        self.references = [unit.outputs(batch) for batch in self.batches]
        self.logits = logits_among(unit.program.outputs(self.batches[0], {}))

    def lost(self, changes: Mapping[int, Change]) -> float:
        moved = [self.unit.outputs(batch, changes) for batch in self.batches]
        each = [divergence(old, new, self.logits) for old, new in zip(self.references, moved, strict=True)]
        return sum(share * value for share, value in zip(self.shares, each, strict=True))


def coarse_loss(known: tdc.Statistics, unit: Unit) -> Callable[[Candidate], float]:
    """The loss that a candidate is predicted to cause by sensitivities at errors of 0.03 and 0.3 alone."""
    entries = {}
    for order, entry in known.of(unit.sites).items():
        probes = tuple((error, value) for error, value in entry.probes if error > 0.01)
        small = next((value for _, value in probes if value > 0), entry.sensitivity)
        entries[order] = replace(entry, probes=probes, sensitivity=small)
    return lambda choice: choice.error * entries[choice.site.order].sensitivity_at(choice.error)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks."""
    a, b = (np.argsort(np.argsort(np.asarray(values))).astype(float) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1])


def figure(value: float) -> str:
    return f"{value:.4g}"


def add_row(row: Mapping[str, object], again: Callable[[Mapping[str, str]], bool] = lambda old: False) -> None:
    """Write a row in place of that of the same experiment, net and case; a run that is stopped keeps what it found."""
    print({key: value for key, value in row.items() if value != ""}, flush=True)
    kept = [old for old in read_rows(NAME) if any(old.get(key) != str(row[key]) for key in KEYS) and not again(old)]
    write_rows(NAME, [*kept, row])
