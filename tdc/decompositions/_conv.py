"""What the decompositions of convolutions share: the weight by modes, its error curves, and lattices of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from ..ir import Layout, Metric
from ._linalg import energy
from ._modes import ModeCurves, ModeFit, fit_modes, mode_curves

__all__ = ["ModeProblem", "geometric", "mode_problem", "taps", "weight_axes"]

_POINTS = 12
WEIGHT_AXES = ("g", "o", "i", "p", "q", "z")


def taps(axes: Mapping[str, int]) -> int:
    """Number of window positions of a convolution's weight."""
    return prod(size for axis, size in axes.items() if axis not in ("g", "o", "i"))


def weight_axes(layout: Layout) -> dict[str, int]:
    """The canonical axes of the weight among those of a layout."""
    return {axis: size for axis, size in layout.sizes if axis in WEIGHT_AXES}


def geometric(limit: int, multiple: int) -> list[int]:
    """Multiples of ``multiple`` up to ``limit``: all of them, or some twenty, close together where they are small."""
    every = range(multiple, limit + 1, multiple)
    if len(every) <= 2 * _POINTS:
        return list(every)
    ratio = (limit / multiple) ** (1 / (_POINTS - 1))
    wanted = {max(1, round(ratio**k)) * multiple for k in range(_POINTS)}
    fill = {round(k * limit / (_POINTS * multiple)) * multiple for k in range(1, _POINTS + 1)}
    return sorted(rank for rank in wanted | fill if multiple <= rank <= limit)


class ModeProblem:
    """``W[t, a, d]`` per group, its input mode ``a`` to be reduced: the channels, or channels with some window axes.

    ``inner``: the axes of the weight that make up ``a``, from ``i`` on; ``d`` are the window axes after them.
    """

    def __init__(self, weight: Tensor, axes: Mapping[str, int], metric: Metric, inner: int) -> None:
        groups, sizes = axes["g"], list(axes.values())[2:]
        self.metric = metric
        self.weight = weight.reshape(groups, axes["o"], prod(sizes[:inner]), prod(sizes[inner:]))
        self.energy = energy(weight.reshape(groups, axes["o"], -1), metric)
        self._curves: ModeCurves | None = None

    @property
    def curves(self) -> ModeCurves:
        if self._curves is None:
            self._curves = mode_curves(self.weight, self.metric.second_moment)
        return self._curves

    def errors(self, lattice: Sequence[Mapping[str, int]]) -> list[float]:
        """Errors of the start values at ranks r of the mode, and s of the outputs where there are some, as fractions
        of the mean square of the output, in [0, 1].
        """
        if not lattice:
            return []
        if "s" not in lattice[0]:
            return self._relative([self.curves.error(ranks["r"]) for ranks in lattice])
        outputs = sorted({ranks["s"] for ranks in lattice})
        inner = {ranks["r"] for ranks in lattice}
        table = {r: dict(zip(outputs, self.curves.errors(r, outputs), strict=True)) for r in inner}
        return self._relative([table[ranks["r"]][ranks["s"]] for ranks in lattice])

    def _relative(self, errors: Sequence[float]) -> list[float]:
        return [min(1.0, max(0.0, error / self.energy)) if self.energy > 0 else 0.0 for error in errors]

    def fit(self, rank: int, outputs: int | None) -> ModeFit:
        return fit_modes(self.weight, self.metric.second_moment, rank, outputs, curves=self.curves)


_last: list[tuple[Tensor, int, Metric, int, ModeProblem]] = []


def mode_problem(weight: Tensor, axes: Mapping[str, int], metric: Metric, inner: int) -> ModeProblem:
    """The problem of that weight; those of the last weight are kept, since several decompositions ask for them."""
    version = 0 if weight.is_inference() else weight._version
    if _last and not (_last[0][0] is weight and _last[0][1] == version and _last[0][2] is metric):
        _last.clear()
    for entry in _last:
        if entry[3] == inner:
            return entry[4]
    problem = ModeProblem(weight, axes, metric, inner)
    _last.append((weight, version, metric, inner, problem))
    return problem
