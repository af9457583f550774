"""The baselines: each gives approximated weights and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdc.planning.suggest import evbmf

from .layers import Layer

__all__ = ["BASELINES", "Answer", "balf_ranks"]

Loss = Callable[[Mapping[str, Tensor]], float]
"""How much worse the model is with these weights, on data apart from that to be measured on."""


@dataclass(frozen=True)
class Answer:
    """``ranks``: of the weights that are one product of two factors."""

    weights: Mapping[str, Tensor]
    params: int
    macs: float
    ranks: Mapping[str, int] = field(default_factory=dict)


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def scaled(weight: Tensor, size: Tensor, rank: int) -> Tensor:
    """ASVD: the SVD of ``W diag(s)``, ``s = E|x|^0.5``."""
    scale = size.clamp(min=1e-6 * float(size.max())).sqrt()
    return truncated(weight * scale, rank) / scale


def whitened(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """SVD-LLM: the SVD of ``W L`` with ``L L^T = E[x x^T]``."""
    root = _root(gram)
    return torch.linalg.solve_triangular(root, truncated(weight @ root, rank), upper=False, left=False)


def _root(gram: Tensor) -> Tensor:
    ridge, eye = 1e-9 * float(gram.trace()) / len(gram), torch.eye(len(gram), dtype=gram.dtype)
    while True:
        root, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if int(failed) == 0:
            return root
        ridge *= 10


def answer(layers: Sequence[Layer], ranks: Sequence[int | None], fit: Callable[[Layer, int], Tensor]) -> Answer:
    """None, or a rank that stores no less: dense."""
    weights, kept_ranks, params, macs = {}, {}, 0, 0.0
    for layer, rank in zip(layers, ranks, strict=True):
        kept = layer.dense if rank is None else layer.cost(max(1, rank))
        if kept < layer.dense:
            kept_ranks[layer.site.name] = max(1, int(rank or 1))
            weights[layer.site.name] = fit(layer, kept_ranks[layer.site.name])
        params, macs = params + kept, macs + kept * layer.rows
    return Answer(weights, params, macs, kept_ranks)


def uniform(layers: Sequence[Layer], keep: float) -> list[int | None]:
    """SVD-LLM's rule: ``rank = keep m n / (m + n)``."""
    return [int(keep * layer.dense / sum(layer.weight.shape)) for layer in layers]


def svd(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    return answer(layers, uniform(layers, keep), lambda layer, rank: truncated(layer.weight, rank))


def svd_llm(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    return answer(layers, uniform(layers, keep), lambda layer, rank: whitened(layer.weight, layer.gram, rank))


_RATIOS = (0.9, 0.7, 0.5, 0.3, 0.1)


def asvd(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    """Each layer the smallest ratio whose own loss is below a threshold, which is as high as the budget needs."""

    def fit(layer: Layer, rank: int) -> Tensor:
        return scaled(layer.weight, layer.size, rank)

    table = []
    for layer in layers:
        ranks = [max(1, int(ratio * layer.dense / sum(layer.weight.shape))) for ratio in _RATIOS]
        table.append([(rank, loss({layer.site.name: fit(layer, rank)})) for rank in ranks])

    def at(threshold: float) -> list[int | None]:
        return [min((rank for rank, lost in row if lost <= threshold), default=None) for row in table]

    return answer(layers, _first_within(layers, sorted({x for row in table for _, x in row}), at, keep, quantity), fit)


def balf(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    energies = []
    for layer in layers:
        values = torch.linalg.svdvals(layer.weight @ _root(layer.gram)).square()
        energies.append((values.cumsum(0) / values.sum()).tolist())
    ranks = balf_ranks(layers, energies, keep, quantity)
    return answer(layers, ranks, lambda layer, rank: whitened(layer.weight, layer.gram, rank))


def balf_ranks(
    layers: Sequence[Layer], energies: Sequence[Sequence[float]], keep: float, quantity: str
) -> list[int | None]:
    """BALF: the greatest sum of the layers' normalised cumulative energies within the budget, by bisection of the
    Lagrangian multiplier.
    """

    def at(price: float) -> list[int | None]:
        ranks: list[int | None] = []
        for layer, energy in zip(layers, energies, strict=True):
            unit = _weight(layer, quantity)
            rows = [(energy[r - 1] - price * unit * layer.cost(r), -r) for r in range(1, layer.full + 1)]
            best = max([*rows, (1.0 - price * unit * layer.dense, 0)])
            ranks.append(-best[1] or None)
        return ranks

    low, high = 0.0, 1.0
    while not _within(layers, at(high), keep, quantity):
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(layers, at(middle), keep, quantity) else (middle, high)
    return at(high)


_SPLITS = (1, 2, 4, 8)


def alds(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    """ALDS: the least largest relative error in the operator norm, ``sqrt(k) max_i s_i(r + 1) / s(1)`` for k parts of
    the inputs; each layer with the split that needs least for it.
    """
    spectra = [{k: _parts(layer.weight, k) for k in _SPLITS if k <= layer.weight.shape[1]} for layer in layers]

    def best(layer: Layer, spectrum: Mapping[int, Tensor], error: float) -> tuple[int, int, int] | None:
        rows = []
        for k, values in spectrum.items():
            rank = int((values > error / k**0.5).sum())
            cost = max(1, rank) * (k * layer.weight.shape[0] + layer.weight.shape[1])
            rows.append((cost, k, max(1, rank)))
        found = min(rows)
        return found if found[0] < layer.dense else None

    low, high = 0.0, 2.0
    for _ in range(60):
        error = (low + high) / 2
        chosen = [best(layer, spectrum, error) for layer, spectrum in zip(layers, spectra, strict=True)]
        low, high = (low, error) if _cost(layers, chosen, quantity) <= keep else (error, high)
    chosen = [best(layer, spectrum, high) for layer, spectrum in zip(layers, spectra, strict=True)]
    weights, params, macs = {}, 0, 0.0
    for layer, found in zip(layers, chosen, strict=True):
        kept = layer.dense if found is None else found[0]
        if found is not None:
            parts = layer.weight.chunk(found[1], 1)
            weights[layer.site.name] = torch.cat([truncated(part, found[2]) for part in parts], 1)
        params, macs = params + kept, macs + kept * layer.rows
    return Answer(weights, params, macs)


def vbmf(layers: Sequence[Layer], keep: float, quantity: str, loss: Loss) -> Answer:
    """Ranks that the weights suggest by themselves: the budget is not looked at."""
    ranks: list[int | None] = [
        evbmf(torch.linalg.svdvals(layer.weight).tolist(), *layer.weight.shape) for layer in layers
    ]
    return answer(layers, ranks, lambda layer, rank: truncated(layer.weight, rank))


def _parts(weight: Tensor, k: int) -> Tensor:
    """Of k parts of the inputs the largest singular value of each place, over the largest of all."""
    spectra = [torch.linalg.svdvals(part) for part in weight.chunk(k, 1)]
    length = min(map(len, spectra))
    return torch.stack([values[:length] for values in spectra]).amax(0) / torch.linalg.matrix_norm(weight, 2)


def _weight(layer: Layer, quantity: str) -> float:
    return layer.rows if quantity == "macs" else 1.0


def _cost(layers: Sequence[Layer], chosen: Sequence[tuple[int, int, int] | None], quantity: str) -> float:
    pairs = [(_weight(layer, quantity), layer.dense, found) for layer, found in zip(layers, chosen, strict=True)]
    return sum(w * (dense if f is None else f[0]) for w, dense, f in pairs) / sum(w * dense for w, dense, _ in pairs)


def _within(layers: Sequence[Layer], ranks: Sequence[int | None], keep: float, quantity: str) -> bool:
    chosen = [None if r is None else (layer.cost(r), 1, r) for layer, r in zip(layers, ranks, strict=True)]
    return _cost(layers, chosen, quantity) <= keep


def _first_within(
    layers: Sequence[Layer],
    thresholds: Sequence[float],
    at: Callable[[float], list[int | None]],
    keep: float,
    quantity: str,
) -> list[int | None]:
    """The ranks of the lowest threshold that keeps to the budget (those of the highest one if none does)."""
    for threshold in thresholds:
        if _within(layers, ranks := at(threshold), keep, quantity):
            return ranks
    return at(thresholds[-1])


BASELINES: dict[str, Callable[[Sequence[Layer], float, str, Loss], Answer]] = {
    "svd": svd,
    "asvd": asvd,
    "svd_llm": svd_llm,
    "balf": balf,
    "alds": alds,
    "vbmf": vbmf,
}
