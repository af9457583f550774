"""E9: how little calibration data is too little, whether TDC says so, and what data of another kind costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import shared_data
from planning_common import add_row, figure, known_statistics, vgg11
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import NnProgram
from tdc.statistics import divergence, logits_among, without_padding

__all__ = ["images", "sentences"]

IMAGES, SENTENCES = (16, 64, 256, 1024), (16, 128, 1024)


@dataclass
class Held:
    """What a model gives on some batches."""

    model: nn.Module
    batches: list[Any]

    def lost(self, small: nn.Module) -> float:
        """By how far the outputs of another model differ, on average over the batches."""
        old, new = (NnProgram(model, self.batches[0]) for model in (self.model, small))
        changes = []
        for batch in old.batches(self.batches):
            reference, real = old.outputs(batch, {}), old.unpadded(batch)
            pair = (without_padding(outputs, real) for outputs in (reference, new.outputs(batch, {})))
            changes.append(divergence(*pair, logits_among(reference)))
        return sum(changes) / len(changes)


def split_half(known: tdc.Statistics) -> str:
    """The greatest ratio of errors on the unseen and the seen half, as calibration states it."""
    said = [m.group(1) for r in known.remarks if (m := re.search(r"is up to (\S+) times", r.reason))]
    return said[0] if said else "<= 1.1"


def few_rows(known: tdc.Statistics) -> str:
    """What calibration says of sites with few rows, shortened."""
    said = [r.reason.partition(" (")[0] for r in known.remarks if "calibration rows per input" in r.reason]
    return said[0] if said else ""


def images(cache: Path | None, budget: str = "params=0.2") -> None:
    for count in IMAGES:
        case = vgg11(count, 2000)
        known = known_statistics(case, cache)
        small, plan = cut(case.model, case.calibration[0], known, budget)
        right = accuracy(small, case.held_out, case.labels)
        row = {
            "experiment": "E9",
            "net": "vgg11",
            "case": f"{count} images, {budget}",
            "split half": split_half(known),
            "predicted": figure(plan.loss),
            "measured": figure(Held(case.model, list(case.held_out[:512].split(256))).lost(small)),
            "accuracy": f"{right:.2f}",
            "note": few_rows(known),
        }
        row["ratio"] = f"{float(row['measured']) / plan.loss:.3f}"
        add_row(row)


@torch.no_grad()
def accuracy(model: nn.Module, data: Tensor, labels: Tensor) -> float:
    answers = torch.cat([model(part).argmax(1) for part in data.split(250)])
    return 100 * float((answers == labels).float().mean())


def cut(model: nn.Module, example: Any, known: tdc.Statistics, budget: str, **more: Any) -> tuple[nn.Module, tdc.Plan]:
    """The model cut by a plan for the budget, fitted on the statistics alone."""
    plan = tdc.plan(model, example, budget=budget, statistics=known, progress=False, **more)
    return tdc.compress(model, example, plan=plan, statistics=known, progress=False, **more), plan


def sentences(budget: str = "params=0.6") -> None:
    """MiniLM, calibrated on sentences of Python's documentation or of WikiText-2, measured on 256 others of both."""
    from tdc.demo import Encoder, load_minilm
    from tdc.demo import sentences as documentation

    model, tokenizer = load_minilm()
    encoder = Encoder(tokenizer)
    texts = {"documentation": documentation(), "wikitext": wikitext()}
    parts = {}
    for name, all_of in texts.items():
        order = torch.randperm(len(all_of), generator=torch.Generator().manual_seed(0)).tolist()
        parts[name] = [all_of[k] for k in order]
    held = {name: encoder.batches(own[-256:]) for name, own in parts.items()}
    runs = [(name, count) for count in SENTENCES for name in texts]
    for name, count in runs:
        calibration, probe = encoder.batches(parts[name][:count], 8), encoder.batches(parts[name][-288:-256])
        known = tdc.calibrate(model, calibration, probe=probe, exclude="pooler.dense", progress=False)
        small, plan = cut(model, calibration[0], known, budget, exclude="pooler.dense")
        row: dict[str, Any] = {"experiment": "E9", "net": "minilm", "case": f"{count} of {name}, {budget}"}
        row |= {"split half": split_half(known), "predicted": figure(plan.loss), "note": few_rows(known)}
        for where, batches in held.items():
            lost = Held(model, batches).lost(small)
            row["measured" if where == name else "measured other"] = figure(lost)
            reference = encoder.of_module(model, batches)
            cosine = (encoder.of_module(small, batches) * reference).sum(-1).mean()
            row["accuracy" if where == name else "accuracy other"] = f"{cosine:.4f}"
        row["ratio"] = f"{float(row['measured']) / plan.loss:.3f}"
        add_row(row)


def wikitext() -> list[str]:
    """Sentences of 40 to 200 characters of WikiText-2's validation part."""
    text = shared_data("wikitext2_valid.txt").read_text()
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("=")]
    found = [part.strip() for line in lines for part in re.split(r"(?<= \.) ", line)]
    return [part for part in dict.fromkeys(found) if 40 <= len(part) <= 200]
