"""For tests of TDC, and of decompositions and targets that others add: random problems, references and asserts.

The references are slow, in numpy and float64, and share no code with what they judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from .frontends.program import sketch
from .ir import Block, Metric, Op, OpKind, Site

__all__ = [
    "assert_close",
    "count_macs",
    "optimal_error",
    "random_metric",
    "random_mlp",
    "random_site",
    "random_weight",
    "relative_error",
    "run_block",
]


def random_weight(rows: int, columns: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """A float64 weight (o, i) with singular values near 1, 1/2, 1/3, ...; with ``rank``, of exactly that rank."""
    generator = torch.Generator().manual_seed(1000 * seed + 31 * rows + columns)
    left = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    least = min(rows, columns) if rank is None else rank
    decay = 1 / torch.arange(1, least + 1, dtype=torch.float64)
    return (torch.linalg.qr(left).Q[:, :least] * decay) @ torch.linalg.qr(right).Q[:least]


def random_metric(columns: int, *, rank: int | None = None, seed: int = 0) -> Metric:
    """The ``input`` metric of correlated random inputs; with ``rank``, a singular one that has seen so many
    directions.
    """
    generator = torch.Generator().manual_seed(77 * seed + columns)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    if rank is not None:
        inputs[:, rank:] = 0
    inputs = inputs @ (mix + torch.eye(columns, dtype=torch.float64))
    return Metric("input", inputs.T @ inputs / len(inputs))


def random_site(weight: Tensor, *, order: int = 0, name: str = "layer.weight", uses: int = 1) -> Site:
    """The linear site that a frontend finds for ``weight`` (o, i)."""
    sizes = (("o", weight.shape[0]), ("i", weight.shape[1]))
    dtype = str(weight.dtype).removeprefix("torch.")
    return Site(OpKind.LINEAR, sizes, dtype, order, sketch(weight), (name,), uses)


def random_mlp(
    widths: Sequence[int] = (24, 40, 16), *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """Linear layers (modules "0", "2", ...) of the given widths with ReLU between them, their weights of
    falling spectrum.
    """
    layers: list[nn.Module] = []
    for k, (inner, outer) in enumerate(pairwise(widths)):
        layer = nn.Linear(inner, outer)
        with torch.no_grad():
            layer.weight.copy_(random_weight(outer, inner, seed=seed + k))
            layer.bias.copy_(torch.linspace(-1, 1, outer))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval()


def relative_error(weight: Tensor, approximation: Tensor, metric: Metric) -> float:
    """``tr(D S D^T) / tr(W S W^T)`` with ``D = W - W_hat``; S is the identity for ``weight``."""
    dense = weight.double().numpy()
    second = np.eye(dense.shape[1]) if metric.second_moment is None else metric.second_moment.numpy()
    difference = dense - approximation.detach().double().numpy()
    return float(np.trace(difference @ second @ difference.T) / np.trace(dense @ second @ dense.T))


def optimal_error(weight: Tensor, metric: Metric, rank: int) -> float:
    """Least relative squared error of any weight of that rank: the tail of the SVD of ``W L``, ``S = L L^T``
    (Cholesky).

    For a singular S, ``L`` is its symmetric root.
    """
    root = np.eye(weight.shape[1])
    if metric.second_moment is not None:
        second = metric.second_moment.numpy()
        try:
            root = np.linalg.cholesky(second)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(second)
            root = vectors * np.sqrt(np.clip(values, 0, None))
    energy = np.linalg.svd(weight.numpy() @ root, compute_uv=False) ** 2
    return float(energy[rank:].sum() / energy.sum())


def run_block(block: Block, factors: Mapping[str, Tensor], activation: Tensor) -> Tensor:
    """What ``block`` computes from an activation (rows, i), op by op in float64."""
    return torch.from_numpy(_trace(block, factors, activation)[0])


def count_macs(block: Block, factors: Mapping[str, Tensor]) -> int:
    """Multiply-adds for one activation row, counted on the arrays: numbers that come out times numbers summed
    for each.
    """
    return _trace(block, factors, torch.zeros(1, dict(block.sizes)["i"]))[1]


def _trace(block: Block, factors: Mapping[str, Tensor], activation: Tensor) -> tuple[np.ndarray, int]:
    constants = {name: f.double().numpy() if f.is_floating_point() else f.numpy() for name, f in factors.items()}
    values = {block.input: activation.double().numpy()}
    macs = 0
    for op in block.ops:
        operands = [values[name] if name in values else constants[name] for name in op.inputs]
        values[op.output] = _compute(op, operands)
        if op.kind == "matmul":
            macs += values[op.output].size * _summed(op, operands)
    return values[block.output], macs


def _compute(op: Op, operands: list[np.ndarray]) -> np.ndarray:
    if op.kind == "take":
        return operands[0][:, operands[1][op.start : op.stop]]
    if op.kind == "concat":
        return np.concatenate(operands, axis=1)
    if op.kind == "add":
        return operands[0] + operands[1]
    assert op.kind == "matmul"
    assert op.equation is not None
    number = {axis: k for k, axis in enumerate(op.equation.axes)}
    terms = [[number[axis] for axis in term.axes] for term in (*op.equation.inputs, op.equation.output)]
    return np.einsum(operands[0], terms[0], operands[1], terms[1], terms[2])


def _summed(op: Op, operands: list[np.ndarray]) -> int:
    assert op.equation is not None
    terms = zip(op.equation.inputs, operands, strict=True)
    length = {axis: array.shape[k] for term, array in terms for k, axis in enumerate(term.axes)}
    return int(np.prod([length[axis] for axis in op.equation.contracted], dtype=int))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """``||actual - expected|| <= tolerance ||expected||`` (Frobenius), with equal shapes; any scale, and zero,
    is fine.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = float(expected.detach().double().abs().max()) if expected.numel() else 0.0
    wanted = expected.detach().double() / (scale or 1.0)
    error = float((actual.detach().double() / (scale or 1.0) - wanted).norm())
    limit = tolerance * float(wanted.norm())
    assert error <= limit, f"relative error {error / (limit / tolerance or 1.0):.3g}, allowed {tolerance:.3g}"
