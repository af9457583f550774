"""What formats with a core share: the weighted Tucker-2 core that fits start from, and lattices of balanced ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._als import AlternatingDecomposition, refine
from ._conv import geometric, mode_problem, taps
from ._linalg import power_of_two
from ._modes import fit_modes
from ._quadratic import damped
from .base import Factors

__all__ = ["CoreDecomposition", "WhiteCore", "balanced"]

_STEERING = 1e-3
_MOST_BONDS = 1500
"""Factors with more bonds are left as the start has them: their normal equations are squares of that size."""


def balanced(full: Mapping[str, float], multiple: int) -> list[dict[str, int]]:
    """Ranks in the same proportions as ``full``, rounded down to multiples, from the least up to ``full``."""
    longest = max(full.values())
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for point in geometric(int(longest), multiple):
        ranks = {axis: max(multiple, int(size * point / longest / multiple) * multiple) for axis, size in full.items()}
        if all(ranks[axis] <= size for axis, size in full.items()):
            found[tuple(ranks.values())] = ranks
    return list(found.values())


class WhiteCore:
    """The weighted Tucker-2 approximation ``u[o s] core[s r *] v[r i]`` of a convolution.

    ``white`` is its core as the metric sees it: the modes r and * whitened by the marginals of the second moment, which
    is nearly their Kronecker product. ``second`` is the very metric of the core, without S None. The outer factor
    carries the scale of the weight. ``apart``: every window axis is a mode by itself. ``sweeps``: those of
    :func:`._modes.fit_modes`.
    """

    def __init__(
        self,
        weight: Tensor,
        axes: Mapping[str, int],
        metric: Metric,
        ranks: Mapping[str, int],
        *,
        apart: bool,
        sweeps: int = 0,
    ) -> None:
        problem = mode_problem(weight, axes, metric, inner=1)
        second = metric.second_moment
        found = fit_modes(problem.weight, second, ranks["r"], ranks["s"], curves=problem.curves, sweeps=sweeps)
        assert found.outer is not None
        scale = power_of_two(weight)
        self.outer, self.inner = found.outer * scale, found.inner
        windows = list(axes.values())[3:] if apart else [taps(axes)]
        self.error = found.error
        self.core = found.core.reshape(*found.core.shape[:3], *windows) / scale
        channel, *rest = _marginals(second, axes["g"], [axes["i"], *windows])
        self.second = None if second is None else _projected(second, self.inner, axes["g"])
        self._roots = [_root(self.inner @ channel @ self.inner.mT), *map(_root, rest)]

    @property
    def white(self) -> Tensor:
        """The core (g, s, r, *) with white modes r and *."""
        tensor = self.core
        for k, root in enumerate(self._roots):
            moved = tensor.movedim(k + 2, -1)
            tensor = (moved.flatten(1, -2) @ root).reshape(moved.shape).movedim(-1, k + 2)
        return tensor

    def plain(self, factor: Tensor, dim: int, mode: int) -> Tensor:
        """A factor of the white core whose axis ``dim`` is its white mode r (``mode`` 0) or one of * (1, ...), with the
        mode itself there.
        """
        moved = factor.movedim(dim, 1)
        solved = torch.linalg.solve_triangular(self._roots[mode].mT, moved.flatten(2), upper=True)
        return solved.reshape(moved.shape).movedim(1, dim)

    def absorbed(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors (g, n, k) of the white modes s, r and * as those of the weight's modes o, i and *."""
        outer, *rest = factors
        inner, *windows = (self.plain(factor, 1, mode) for mode, factor in enumerate(rest))
        return [self.outer @ outer, self.inner.mT @ inner, *windows]


def _marginals(second: Tensor | None, groups: int, sizes: Sequence[int]) -> list[Tensor]:
    """S averaged over all input axes but one, for each axis: (g, k, k)."""
    if second is None:
        return [torch.eye(n, dtype=torch.float64).repeat(groups, 1, 1) for n in sizes]
    cube = second.reshape(-1, *sizes, *sizes).expand(groups, *[-1] * (2 * len(sizes)))
    cube = cube / power_of_two(second.diagonal(dim1=-2, dim2=-1))
    names = "abcdefgh"[: len(sizes)]
    return [torch.einsum(f"z{names}{names.replace(name, 'x')}->z{name}x", cube) for name in names]


def _projected(second: Tensor, inner: Tensor, groups: int) -> Tensor:
    """``(V x I) S (V x I)^T`` (g, r d, r d) for V (g, r, i): the metric of a core behind V."""
    width, channels = second.shape[-1], inner.shape[2]
    half = inner @ second.reshape(-1, width, width).reshape(-1, channels, width // channels * width)
    half = half.reshape(groups, -1, width).mT.reshape(groups, channels, -1)
    result = (inner @ half).reshape(groups, -1, half.shape[2] // (width // channels))
    return (result + result.mT) / 2


def _root(moment: Tensor) -> Tensor:
    return torch.linalg.cholesky(damped(moment, _STEERING))


class CoreDecomposition(AlternatingDecomposition):
    """Formats with factors between other factors: the small ones are fitted in the metric, large ones as they start."""

    probes = 4

    def _fit(self, weight: Tensor, layout: Layout, metric: Metric, sweeps: int) -> tuple[Factors, float]:
        start, names = self.start(weight, layout, metric), _light(layout)
        factors, error = refine(start, layout, weight, metric, sweeps=sweeps, names=names)
        return self.finish(factors, layout), error


def _light(layout: Layout) -> list[str]:
    sizes, kept = layout.axes, layout.rebuild.output.axes
    bonds = {
        name: prod(sizes[axis] for axis in term.axes if axis not in kept)
        for name, term in layout.rebuild.factors.items()
    }
    return [name for name, number in bonds.items() if number <= _MOST_BONDS]
