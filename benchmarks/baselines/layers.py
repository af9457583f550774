"""What the baselines know of a model: its layers as matrices, with moments of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdc.frontends.nn import NnProgram
from tdc.ir import Site
from tdc.statistics.patches import input_rows

__all__ = ["Layer", "layers_of", "with_weights"]


@dataclass(frozen=True, eq=False)
class Layer:
    """``weight`` (m, n), ``gram`` = E[x x^T] (n, n), ``size`` = E|x| (n), float64; ``rows``: inputs per batch."""

    site: Site
    weight: Tensor
    gram: Tensor
    size: Tensor
    rows: float

    @property
    def dense(self) -> int:
        return self.weight.numel()

    def cost(self, rank: int) -> int:
        return min(rank * sum(self.weight.shape), self.dense)

    @property
    def full(self) -> int:
        """The largest rank that stores less than dense."""
        return (self.dense - 1) // sum(self.weight.shape)


def layers_of(program: NnProgram, batches: Sequence[Any], sites: Sequence[Site]) -> list[Layer]:
    """The sites without groups, with their moments over the batches, without padding."""
    chosen = [site for site in sites if site.matrix[0] == 1]
    grams: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    rows: dict[int, int] = {}

    real: Tensor | None = None

    def tap(site: Site, activation: Tensor) -> None:
        for chunk, _ in input_rows(site, activation, rows.get(site.order, 0), real):
            x = chunk[:, 0].double()
            grams[site.order] = grams.get(site.order, 0) + x.T @ x
            sizes[site.order] = sizes.get(site.order, 0) + x.abs().sum(0)
            rows[site.order] = rows.get(site.order, 0) + len(x)

    for batch in program.batches(list(batches)):
        real = program.unpadded(batch)
        program.observe(batch, chosen, tap)
    return [
        Layer(
            site,
            program.weight(site).double().reshape(site.matrix[1:]),
            grams[site.order] / rows[site.order],
            sizes[site.order] / rows[site.order],
            rows[site.order] / len(batches),
        )
        for site in chosen
    ]


@contextmanager
def with_weights(model: nn.Module, layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with other weights inside the block, by name; those of before behind it.

    A layer's weight has the normalisation behind it folded in, which scales its rows: that is taken out again.
    """
    before = {}
    for layer in layers:
        name = layer.site.name
        if name in weights:
            own = model.get_parameter(name)
            before[name] = own.data
            rows = own.data.double().reshape(layer.weight.shape)
            scale = (layer.weight * rows).sum(1) / rows.square().sum(1).clamp(min=1e-300)
            own.data = (weights[name] / scale[:, None]).reshape(own.shape).to(own.dtype)
    try:
        yield model
    finally:
        for name, weight in before.items():
            model.get_parameter(name).data = weight
