"""Sensitivity of CP factors, and the correction that lowers it at nearly the same error.

Best approximations of a given rank need not exist: terms may grow and cancel. The error-preserving correction (Phan,
Tichavsky, Sobolev, Sozykin, Ermilov, Cichocki 2020) takes of all factors with at most 1.02 times the error those of
least sensitivity

    ss = sum_k n_k sum_r prod_{j != k} ||f_j[:, r]||^2,

the squared error of the weight for a unit of noise in every entry of the factors; n_k are the sizes of the modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, log

import torch
from torch import Tensor

from ..ir import Layout, Metric
from ._contract import contract
from ._quadratic import Factor, Problem, damped, solve
from .base import Factors, cancellation

__all__ = ["SLACK", "columns", "corrected", "product", "sensitivity", "settled", "spread", "uncolumned"]

SLACK = 1.02
"""The correction may raise the error, as an amplitude, by this factor."""
_LARGEST_TERM = 5.0
_LARGEST_CANCELLATION = 50.0
_NEGLIGIBLE = 1e-12
_TOLERANCE = 1e-4
_LEAST_GAIN = 1e-2
_STEERING = 1e-3
_BISECTIONS = 50
_ROUNDS = 12
_WORK = 30_000_000_000


def product(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result * part
    return result


def spread(factors: Sequence[Tensor], shares: Sequence[float] | None = None) -> list[Tensor]:
    """Factors (g, n_k, r), their columns rescaled: in each term all have the same norm, or norms in these proportions.

    A term with a column of zeros becomes zero.
    """
    norms = torch.stack([factor.norm(dim=1, keepdim=True) for factor in factors])
    alive = (norms > 0).all(0)
    parts = torch.tensor(shares or [1.0] * len(factors), dtype=norms.dtype).reshape(-1, 1, 1, 1)
    mean = (norms.clamp(min=1e-300) / parts).log().mean(0).exp()
    scales = torch.where(alive, mean * parts / torch.where(alive, norms, 1.0), 0.0)
    return [factor * scale for factor, scale in zip(factors, scales, strict=True)]


def columns(factors: Factors, layout: Layout) -> dict[str, Tensor]:
    """Every factor as (g, n, r)."""
    axes, result = layout.axes, {}
    for name, term in layout.rebuild.factors.items():
        rank = next(axis for axis in term.axes if axis not in layout.rebuild.output.axes)
        cube = factors[name].reshape([axes[axis] for axis in term.axes])
        order = [term.axes.index("g"), term.axes.index(rank)]
        own = [k for k in range(len(term.axes)) if k not in order]
        result[name] = cube.permute(order[0], *own, order[1]).reshape(axes["g"], -1, axes[rank])
    return result


def _apart(parts: Mapping[str, Tensor], layout: Layout) -> Factors:
    """The opposite of :func:`columns`, every axis by itself."""
    axes, result = layout.axes, {}
    for name, term in layout.rebuild.factors.items():
        rank = next(axis for axis in term.axes if axis not in layout.rebuild.output.axes)
        kept = ["g", *(axis for axis in term.axes if axis not in ("g", rank)), rank]
        cube = parts[name].reshape([axes[axis] for axis in kept])
        result[name] = cube.permute([kept.index(axis) for axis in term.axes])
    return result


def uncolumned(parts: Mapping[str, Tensor], layout: Layout) -> Factors:
    """The opposite of :func:`columns`."""
    shapes = layout.shapes
    return {name: value.reshape(shapes[name]).contiguous() for name, value in _apart(parts, layout).items()}


def sensitivity(factors: Factors, layout: Layout) -> float:
    """``ss``, see the head of this file, summed over groups."""
    parts = list(columns(factors, layout).values())
    squares = [part.square().sum(1) for part in parts]
    return sum(
        part.shape[1] * float(product([s for j, s in enumerate(squares) if j != k]).sum())
        for k, part in enumerate(parts)
    )


def _sound(factors: Factors, layout: Layout, norm: float) -> bool:
    """Whether no term is far larger than the weight, and the terms do not cancel by far."""
    largest = float(product([part.norm(dim=1) for part in columns(factors, layout).values()]).max())
    return largest <= _LARGEST_TERM * norm and cancellation(factors, layout) <= _LARGEST_CANCELLATION


def settled(factors: Factors, layout: Layout) -> Factors:
    """All columns of a term with one norm, and with a positive largest entry in all factors but the last."""
    parts = columns(factors, layout)
    *front, last = spread(list(parts.values()))
    for k, part in enumerate(front):
        largest = part.gather(1, part.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(part)
        front[k], last = part * sign, last * sign
    return uncolumned(dict(zip(parts, [*front, last], strict=True)), layout)


def corrected(factors: Factors, layout: Layout, weight: Tensor, metric: Metric) -> Factors:
    """Factors of less sensitivity, with an error in the metric at most ``SLACK`` times as large (as an amplitude).

    Where a term is then still larger than 5 times the weight, or the terms cancel so that their sizes add up to more
    than 50 times their sum, the bound of the error is raised until neither is so. There are as many sweeps as
    ``_WORK`` multiply-adds allow, at least four.
    """
    rank = max(part.shape[2] for part in columns(factors, layout).values())
    work = 3 * weight.numel() * rank + (
        12 * weight[0].numel() * weight.numel() if metric.second_moment is not None else 0
    )
    sweeps = min(60, max(4, _WORK // work))
    problem, norm = Problem(weight, layout, metric), float(weight.norm())
    values = problem.apart(factors)
    error = problem.error(values)
    for k in range(_ROUNDS):
        limit = min(1.0, SLACK**2 * 1.1**k * error + (10.0**k * _NEGLIGIBLE if k else 0.0))
        if limit > _NEGLIGIBLE:
            values = _lightened(problem, values, limit, sweeps)
        if _sound(problem.stored(values), layout, norm):
            break
    return settled(problem.stored(values), layout)


def _lightened(problem: Problem, values: Factors, limit: float, sweeps: int) -> Factors:
    """Sweeps over the factors, each replaced by that of least sensitivity within the error ``limit``."""
    layout = problem.layout
    values = _for_noise(problem, values)
    best, least = values, sensitivity(values, layout)
    ridge = 0.0
    for _ in range(sweeps):
        for name in layout.rebuild.factors:
            step = _Step(problem, name, values, limit * problem.relative / problem.second_scale)
            value, ridge = step.solved(ridge)
            values = {**values, name: value}
        values = _for_noise(problem, values)
        now = sensitivity(values, layout)
        if now >= least or problem.error(values) > limit * (1 + _TOLERANCE):
            break
        gain, best, least = least - now, values, now
        if gain < _LEAST_GAIN * least:
            break
    return best


def _for_noise(problem: Problem, values: Factors) -> Factors:
    """The columns of every term in the proportions of least sensitivity, the roots of the sizes of their modes."""
    parts = columns(values, problem.layout)
    sizes = [part.shape[1] ** 0.5 for part in parts.values()]
    return _apart(dict(zip(parts, spread(list(parts.values()), sizes), strict=True)), problem.layout)


class _Rows:
    """A factor as (shared axes of the weight, bonds, own axes of the weight), and what multiplies it."""

    def __init__(self, problem: Problem, name: str, values: Factors) -> None:
        self.problem, self._factor = problem, Factor(problem, name)
        self.axes = self._factor.axes
        self._others = [(values[other], axes) for other, axes in self._factor.terms.items()]

    def adjoint(self, rows: Tensor) -> Tensor:
        """Derivative of ``<rows, X>`` by the factor."""
        return contract([(rows.reshape(self.problem.full), self.problem.order), *self._others], self.axes)

    def gram(self, *, exact: bool) -> Tensor:
        """Gram matrices (shared, bonds, bonds) of what multiplies the factor: in S, or in its marginals."""
        if exact:
            return self._factor.gram(self._others)
        bonds = self._factor.bonds
        size = self._factor.size(bonds)
        return self._factor.marginal_gram(bonds, self._others).reshape(-1, size, size)

    def normal(self, value: Tensor) -> Tensor:
        """The Hessian of the error (halved) times ``value``; in float32."""
        single = [(other.float(), axes) for other, axes in self._others]
        return self._factor.normal(value.float(), single).double()

    def to_rows(self, value: Tensor) -> Tensor:
        factor = self._factor
        order = [self.axes.index(axis) for axis in (*factor.shared, *factor.bonds, *factor.own)]
        return value.permute(order).reshape(-1, factor.size(factor.bonds), factor.size(factor.own))

    def from_rows(self, rows: Tensor) -> Tensor:
        factor = self._factor
        kept = (*factor.shared, *factor.bonds, *factor.own)
        cube = rows.reshape([self.problem.axes[axis] for axis in kept])
        return cube.permute([kept.index(axis) for axis in self.axes])


class _Step:
    """The sensitivity ``|X|_w^2 + rest`` and the error, both quadratic in one factor X for the others as they are.

    ``X(mu) = argmin error + mu |X|_w^2`` is followed to the largest mu whose error is within the limit: in closed form
    (one eigendecomposition) where the normal equations are small, else in the span of a few directions, those of
    conjugate gradients for both quadratics.
    """

    def __init__(self, problem: Problem, name: str, values: Factors, limit: float) -> None:
        piece = problem.layout.rebuild.pieces[0]
        self.problem, self.piece, self.name, self.values, self.limit = problem, piece, name, values, limit
        self.factor = _Rows(problem, name, values)
        self.value = values[name]
        rest = problem.weight - problem.whole(piece, values)
        image = problem.image(rest)
        self.error = float((image * rest).sum())
        self.slope = self.factor.adjoint(image)
        parts = columns(values, problem.layout)
        squares = {n: part.square().sum(1) for n, part in parts.items() if n != name}
        weights = [
            parts[n].shape[1] * product([torch.ones_like(squares[n]), *(s for m, s in squares.items() if m != n)])
            for n in squares
        ]
        total = torch.stack(weights).sum(0)
        self.weights = total + 1e-9 * total.mean() + (1.0 if not total.any() else 0.0)

    def weighted(self, value: Tensor) -> Tensor:
        """Half the derivative of ``|X|_w^2``."""
        return self.factor.from_rows(self.factor.to_rows(value) * self.weights[..., None].to(value.dtype))

    def solved(self, ridge: float) -> tuple[Tensor, float]:
        """The factor and its mu; ``ridge``: the last one's, for the preconditioner."""
        problem = self.problem
        if problem.second is None or not any(axis in problem.inputs for axis in self.factor.axes):
            return self._closed()
        return self._spanned(ridge), ridge

    def _closed(self) -> tuple[Tensor, float]:
        rows, slope = self.factor.to_rows(self.value), self.factor.to_rows(self.slope)
        root = self.weights.sqrt()[..., None]
        gram = self.factor.gram(exact=True)
        values, vectors = torch.linalg.eigh(gram / root / root.mT)
        values = values.clamp(min=0)[..., None]
        now, slope = vectors.mT @ (root * rows), vectors.mT @ (slope / root)
        right = slope + values * now

        def at(mu: float) -> Tensor:
            return right / (values + mu)

        def error(mu: float) -> float:
            change = at(mu) - now
            return self.error + float((change * (values * change - 2 * slope)).sum())

        mu = _largest(error, self.limit, float(values.mean()))
        if mu is None:
            return self.value, 0.0
        return self.factor.from_rows(vectors @ at(mu) / root), mu

    def _spanned(self, ridge: float) -> Tensor:
        heavy = self.weighted(self.value)
        spans, images = self._directions(ridge, heavy)
        weighted = [self.weighted(d) for d in spans]
        hessian = _products(spans, images)
        weight = _products(spans, weighted)
        slope = torch.stack([(d * self.slope).sum() for d in spans])
        pull = torch.stack([(d * heavy).sum() for d in spans])

        def at(mu: float) -> Tensor:
            return solve(hessian + mu * weight, (slope - mu * pull)[:, None], 1e-12)[:, 0]

        def error(mu: float) -> float:
            y = at(mu)
            return self.error + float(y @ (hessian @ y) - 2 * slope @ y)

        mu = _largest(error, self.limit, float(hessian.trace() / weight.trace()))
        if mu is None:
            return self.value
        return self.value + sum((c * d for c, d in zip(at(mu), spans, strict=True)), torch.zeros_like(self.value))

    def _directions(self, ridge: float, heavy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Directions and their images under the Hessian of the error (halved): the two preconditioned slopes, and
        what the Hessian of the sum makes of them.
        """
        factor = self.factor
        gram = factor.gram(exact=False) + ridge * torch.diag_embed(self.weights)
        lower = torch.linalg.cholesky(damped(gram, _STEERING))
        spans: list[Tensor] = []
        images: list[Tensor] = []
        seeds = [self.slope, heavy]
        for k in range(4):
            seed = seeds[k] if k < 2 else images[k - 2] + ridge * self.weighted(spans[k - 2])
            ahead = factor.from_rows(torch.cholesky_solve(factor.to_rows(seed), lower))
            length = float(ahead.norm())
            ahead = ahead / length if length > 0 else ahead
            spans.append(ahead)
            images.append(self.factor.normal(ahead))
        return spans, images


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    found = torch.stack([torch.stack([(a * b).sum() for b in right]) for a in left])
    return (found + found.mT) / 2


def _largest(error: Callable[[float], float], limit: float, unit: float) -> float | None:
    """The largest mu of a rising ``error`` within the limit, by bisection of its logarithm; None if there is none."""
    low, high = log(1e-12 * unit) if unit > 0 else -30.0, log(1e6 * unit) if unit > 0 else 30.0
    if not error(exp(low)) <= limit:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if error(exp(middle)) <= limit else (low, middle)
    return exp(low)
