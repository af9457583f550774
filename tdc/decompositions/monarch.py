"""Linear layers as two block-diagonal products with a transposition between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import power_of_two
from ._shapes import balanced, led, measured
from ._split import SplitDecomposition, cube, singular_squares
from .base import Factors

__all__ = ["Monarch"]

_BLOCKS = {"4x": 4, "8x": 8}


class Monarch(SplitDecomposition):
    """``W[(o1 o2), (i1 i2)] = sum_r a[o1, o2, i1, r] b[r, o2, i1, i2]``: i1 o2 blocks of rank r, r i1 o2 (o1 + i2)
    numbers, as many multiply-adds (Dao et al. 2022; with r > 1 the block tensor train of Qiu et al. 2024).

    The best fit is the SVD of every block (o1, i2), in the input metric with the second moment within each i1;
    alternating least squares in the whole second moment follow. Variants: ``balanced`` block sizes, and 4 or 8 blocks
    along each side. The run is one batched product over i1, then one over o2.
    """

    name = "monarch"
    summary = "two batched block-diagonal products: fast at a quarter of the parameters and below"
    by_default = False
    equations = dict.fromkeys(("balanced", *_BLOCKS), "(o1 o2) (i1 i2) = a[o1 o2 i1 r] b[r o2 i1 i2]")
    optimal_start = True

    def modes(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        count = _BLOCKS.get(variant)
        sides = [balanced(axes[axis], 2) if count is None else led(axes[axis], count) for axis in ("o", "i")]
        outputs, inputs = sides
        return measured("o2 o1 i1 i2", outputs, inputs)

    def full_ranks(self, axes: Mapping[str, int], variant: str) -> dict[str, int]:
        modes = self.modes(axes, variant)
        return {"r": min(modes["o1"], modes["i2"])}

    def rank_lattice(self, axes: Mapping[str, int], multiple: int, variant: str) -> Sequence[dict[str, int]]:
        modes = self.modes(axes, variant)
        stored = modes["i1"] * modes["o2"] * (modes["o1"] + modes["i2"])
        highest = min((axes["o"] * axes["i"] - 1) // stored, *self.full_ranks(axes, variant).values())
        return self.family(axes, variant, highest, multiple, lambda r: {"r": r})

    def squares(self, weight: Tensor, axes: Mapping[str, int], variant: str) -> Tensor:
        blocks = _blocks(cube(weight, self.layout(axes, {"r": 1}, variant)))
        return singular_squares(blocks.flatten(0, 1)).sum(0)

    def start(self, weight: Tensor, layout: Layout, metric: Metric) -> Factors:
        scale, sizes = power_of_two(weight), layout.axes
        blocks = _blocks(cube(weight / scale, layout))
        basis = _bases(blocks, _within(metric, sizes))[..., : sizes["r"]]
        return {
            "a": basis.permute(2, 0, 1, 3).contiguous(),
            "b": (basis.mT @ blocks).permute(2, 0, 1, 3).contiguous() * scale,
        }


def _blocks(cube: Tensor) -> Tensor:
    """(o1, o2, i1, i2) as matrices (o2, i1, o1, i2)."""
    return cube.permute(1, 2, 0, 3)


def _within(metric: Metric, sizes: Mapping[str, int]) -> Tensor | None:
    """The second moment within each i1: (i1, i2, i2)."""
    if metric.second_moment is None:
        return None
    second = metric.second_moment.reshape(sizes["i"], sizes["i"])
    missing = sizes["i1"] * sizes["i2"] - sizes["i"]
    whole = torch.nn.functional.pad(second / power_of_two(second.diagonal()), (0, missing, 0, missing))
    parts = whole.reshape(sizes["i1"], sizes["i2"], sizes["i1"], sizes["i2"])
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _bases(blocks: Tensor, second: Tensor | None) -> Tensor:
    """Orthonormal outputs of each block, by how much they hold of it in the metric; complete."""
    rows, columns = blocks.shape[-2:]
    outer, inner = torch.linalg.qr(blocks) if rows > columns else (None, blocks)
    if second is None:
        basis = torch.linalg.svd(inner, full_matrices=False).U
    else:
        product = inner @ second @ inner.mT
        basis = torch.linalg.eigh((product + product.mT) / 2).eigenvectors.flip(-1)
    return basis if outer is None else outer @ basis
