"""How far the outputs of a model have moved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CalibrationError

__all__ = ["divergence"]

LOGITS = "logits"


def divergence(reference: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> float:
    """Change of a model's floating outputs by name.

    Where an output is named ``logits``: the mean Kullback-Leibler divergence ``KL(softmax(ref) || softmax(moved))``
    in nats over all positions of it alone. Else the mean over outputs of ``||moved - ref||^2 / ||ref||^2``. Raises
    CalibrationError if there is no floating output.
    """
    if LOGITS in reference:
        reference, moved = {LOGITS: reference[LOGITS]}, {LOGITS: moved[LOGITS]}
        return sum(_kl(reference[name], moved[name]) for name in reference)
    if not reference:
        raise CalibrationError("the model has no floating output whose change could be measured")
    return sum(_relative(reference[name], moved[name]) for name in reference) / len(reference)


def _kl(reference: Tensor, moved: Tensor) -> float:
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(moved.float(), -1)
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def _relative(reference: Tensor, moved: Tensor) -> float:
    total = float(reference.double().square().sum())
    change = float((moved.double() - reference.double()).square().sum())
    return change / total if total > 0 else change
