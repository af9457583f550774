"""E11: what folding a BatchNorm, correcting biases and estimating its statistics anew are worth, at equal budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from planning_common import Case, add_row, figure, known_statistics, proposed, realised, vgg11
from torch import Tensor, nn
from vgg import load_vgg11

import tdc
from tdc.frontends.program import Change
from tdc.passes.base import Unit
from tdc.passes.choose_plan import ChoosePlan
from tdc.passes.pipeline import Pipeline

__all__ = ["norms"]

BUDGET = "macs=0.25"
Changes = Mapping[int, Change]


class Affine(nn.Module):
    """A BatchNorm that TDC does not know: ``x scale + offset`` per channel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = gain_of(norm)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("offset", (norm.bias.detach() - norm.running_mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


def gain_of(norm: nn.Module) -> Tensor:
    """What a BatchNorm in evaluation multiplies with."""
    return norm.weight.detach() / (norm.running_var + norm.eps).sqrt()


def norms(cache: Path | None) -> None:
    case = vgg11(512, 1500)
    known = known_statistics(case, cache)
    report("dense", case, case.model)
    folded, changes = changes_of(case, known)
    bare = {order: Change(change.weight) for order, change in changes.items()}
    report("folded, biases corrected", case, Changed(folded, changes), folded)
    report("folded, the same fits, biases not corrected", case, Changed(folded, bare), folded)
    report("folded fits, norms estimated anew", case, estimated_anew(case, folded, bare, folded=True), folded)
    folded, uncorrected = changes_of(case, without_bias(known))
    report("folded, fitted without a correction", case, Changed(folded, uncorrected), folded)

    apart = replace_norms(case)
    known = known_statistics(apart, cache)
    unfolded, changes = changes_of(apart, known)
    report("not folded, biases corrected", apart, Changed(unfolded, changes), unfolded)
    unfolded, changes = changes_of(apart, without_bias(known))
    report("nothing: not folded, not corrected", apart, Changed(unfolded, changes), unfolded)
    anew = estimated_anew(case, unfolded, changes, folded=False)
    report("not folded, norms estimated anew", case, anew, unfolded)


def changes_of(case: Case, known: tdc.Statistics) -> tuple[Unit, dict[int, Change]]:
    """The unit, with a plan for the budget, and the fits."""
    unit = proposed(case, known)
    unit = Pipeline((ChoosePlan(),)).run(unit.having(options=replace(unit.options, budget=BUDGET)))
    assert unit.plan is not None
    choices = [choice for choice in unit.plan.choices if not choice.is_dense]
    return unit, realised(unit.having(plan=None), choices)


def without_bias(known: tdc.Statistics) -> tdc.Statistics:
    """Statistics of sites that have no bias of their own: the metric keeps the mean, and nothing takes it up."""
    return replace(known, sites=tuple(replace(e, site=replace(e.site, bias=False)) for e in known.sites))


def replace_norms(case: Case) -> Case:
    model = load_vgg11()
    for k, layer in enumerate(model.features):
        if isinstance(layer, nn.BatchNorm2d):
            model.features[k] = Affine(layer)
    return replace(case, name="vgg11-affine", model=model.eval())


@torch.no_grad()
def estimated_anew(case: Case, unit: Unit, changes: Changes, *, folded: bool) -> nn.Module:
    """The net with the new weights and its own BatchNorms, whose means and variances are those of the calibration
    data that now pass them; weights with a folded norm are divided by its gain.
    """
    model = load_vgg11()
    names = {site.order: site.name.removesuffix(".weight") for site in unit.sites}
    for order, change in changes.items():
        path = names[order]
        layer = model.get_submodule(path)
        weight = change.weight.reshape(layer.weight.shape)
        if folded and path.startswith("features."):
            behind = model.features[int(path.removeprefix("features.")) + 1]
            weight = weight / gain_of(behind)[:, None, None, None]
        layer.weight.copy_(weight)
    for layer in model.features:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    for part in case.calibration:
        model(part)
    return model.eval()


@torch.no_grad()
def report(what: str, case: Case, logits_of: Callable[[Tensor], Tensor], unit: Unit | None = None) -> None:
    """KL divergence from the dense model, and accuracy; with the loss that the unit's plan predicts."""
    parts, dense = case.held_out.split(250), load_vgg11()
    reference, logits = (torch.cat([function(part) for part in parts]) for function in (dense, logits_of))
    old, new = torch.log_softmax(reference, -1), torch.log_softmax(logits, -1)
    lost = float((old.exp() * (old - new)).sum(-1).mean())
    right = [100 * float((values.argmax(1) == case.labels).float().mean()) for values in (reference, logits)]
    row = {"experiment": "E11", "net": "vgg11", "case": f"{BUDGET}: {what}", "measured": figure(lost)}
    if unit is not None and unit.plan is not None:
        row["predicted"] = figure(unit.plan.loss)
    add_row({**row, "accuracy": f"{right[1]:.2f}", "note": f"{right[0] - right[1]:.2f} points lost"})


class Changed:
    """The logits of a unit's program with changes."""

    def __init__(self, unit: Unit, changes: Changes) -> None:
        self.unit, self.changes = unit, changes

    def __call__(self, x: Tensor) -> Tensor:
        batches: Sequence[Any] = list(self.unit.program.batches([x]))
        (logits,) = self.unit.program.outputs(batches[0], self.changes).values()
        return logits
