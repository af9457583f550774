"""How far the outputs of a model have moved, and losses whose gradients tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError

__all__ = ["Probe", "divergence", "divergence_of", "logits_among", "without_padding"]

LOGITS = "logits"
_CONFIDENT = 0.5
_CHUNK = 1 << 20
"""Logits that are compared at a time."""


def logits_among(outputs: Mapping[str, Tensor]) -> str | None:
    """The output that holds logits: that named ``logits``; else the only one, where it is (examples, classes) and its
    softmax is that of a trained classifier, with a highest probability of one half or more on average.
    """
    if LOGITS in outputs:
        return LOGITS
    if len(outputs) != 1:
        return None
    name, values = next(iter(outputs.items()))
    if values.ndim != 2 or values.shape[1] < 2 or values.shape[0] == 0:
        return None
    highest = torch.softmax(values.detach().float(), -1).amax(-1).mean()
    return name if float(highest) >= _CONFIDENT else None


def without_padding(outputs: Mapping[str, Tensor], unpadded: Tensor | None) -> dict[str, Tensor]:
    """Of outputs (examples, positions, ...) of at least three axes those at the positions that are not padding, by
    ``unpadded`` (examples, positions), in one axis; others, and all of them where it is None, as they are.
    """
    if unpadded is None:
        return dict(outputs)
    return {
        name: v[unpadded.to(v.device)] if v.ndim >= 3 and v.shape[:2] == unpadded.shape else v
        for name, v in outputs.items()
    }


def divergence(reference: Mapping[str, Tensor], moved: Mapping[str, Tensor], logits: str | None = LOGITS) -> float:
    """Change of a model's floating outputs by name.

    Where there is an output of the name ``logits``: the mean Kullback-Leibler divergence
    ``KL(softmax(ref) || softmax(moved))`` in nats over all positions of it alone. Else the mean over outputs of
    ``||moved - ref||^2 / ||ref||^2``. Raises CalibrationError if there is no floating output.
    """
    return float(divergence_of(reference, moved, logits))


def divergence_of(reference: Mapping[str, Tensor], moved: Mapping[str, Tensor], logits: str | None) -> Tensor:
    """The same as a float64 tensor that can be differentiated by ``moved``."""
    if logits is not None and logits in reference:
        return _kl(reference[logits], moved[logits])
    if not reference:
        raise CalibrationError("the model has no floating output whose change could be measured")
    return torch.stack([_relative(reference[name], moved[name]) for name in reference]).mean()


@dataclass(frozen=True)
class Probe:
    """A loss whose gradients have the second moment by which the divergence grows, to second order.

    Of logits with softmax p: ``sum <g, logits>`` over positions, ``g = sqrt(p) v - p <sqrt(p), v>`` with random signs
    v, for which ``E[g g^T] = diag(p) - p p^T``, the Fisher information, as with the cross entropy of labels that are
    drawn from p; but its norm is about the same at every draw, where a label of a confident model is hardly ever
    another one than the likeliest. Of other outputs: ``sqrt(n) sum_k <v_k, y_k> / ||y_k||`` with standard normal
    v, so that the squared gradients are ``n ||dy_k||^2 / ||y_k||^2`` in the mean over v (Hutchinson's estimator);
    n, the number of outputs, keeps them in the range of half precision.
    """

    logits: str | None
    seed: int = 0

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.logits is not None and self.logits in outputs:
            rows = outputs[self.logits].flatten(0, -2).float()
            return (rows * _projected(torch.softmax(rows.detach(), -1), generator)).sum()
        terms = []
        scale = sum(values.numel() for values in outputs.values()) ** 0.5
        for values in outputs.values():
            norm = values.detach().double().norm().clamp(min=torch.finfo(torch.float64).tiny)
            random = scale * torch.randn(values.shape, generator=generator, dtype=torch.float64) / norm.cpu()
            terms.append((values * random.to(values)).sum())
        return torch.stack(terms).sum()


def _projected(p: Tensor, generator: torch.Generator) -> Tensor:
    """``(diag(sqrt(p)) - p sqrt(p)^T) v`` for each row p, which is overwritten, with random signs v."""
    for part in p.split(max(1, _CHUNK // p.shape[1])):
        signs = torch.empty(part.shape, dtype=torch.int8).random_(2, generator=generator).to(part.device)
        root = part.sqrt() * signs.mul_(2).sub_(1)
        torch.addcmul(root, part, root.sum(-1, keepdim=True), value=-1, out=part)
    return p


def _kl(reference: Tensor, moved: Tensor) -> Tensor:
    """A few rows at a time, which stay in the cache: that is more than twice as fast for large vocabularies."""
    classes = reference.shape[-1]
    rows = max(1, _CHUNK // max(1, classes))
    pairs = zip(reference.reshape(-1, classes).split(rows), moved.reshape(-1, classes).split(rows), strict=True)
    each = []
    for own, other in pairs:
        p, q = torch.log_softmax(own.float(), -1), torch.log_softmax(other.float(), -1)
        each.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(each).double().mean()


def _relative(reference: Tensor, moved: Tensor) -> Tensor:
    total = reference.double().square().sum()
    change = (moved.double() - reference.double()).square().sum()
    return change / total if float(total) > 0 else change
