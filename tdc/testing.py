"""For tests of TDC, and of decompositions and targets that others add: random problems, references and asserts.

The references are slow, in numpy and float64, and share no code with what they judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from . import decompositions
from .frontends.program import sketch
from .ir import Block, Layout, Metric, Op, OpKind, Site, Window, window_attributes

__all__ = [
    "EXAMPLE_AXES",
    "applicable",
    "assert_close",
    "count_macs",
    "matrix_of",
    "optimal_error",
    "random_cnn",
    "random_factors",
    "random_metric",
    "random_metric_of",
    "random_mlp",
    "random_site",
    "random_weight",
    "random_weight_of",
    "relative_error",
    "run_block",
    "variants_of",
]

EXAMPLE_AXES: Mapping[str, Mapping[str, int]] = {
    "linear-tall": {"o": 12, "i": 8},
    "linear-wide": {"o": 7, "i": 13},
    "linear-thin": {"o": 11, "i": 2},
    "linear-square": {"o": 5, "i": 5},
    "linear-composite": {"o": 48, "i": 64},
    "conv1d": {"g": 1, "o": 6, "i": 5, "p": 3},
    "conv1d-pointwise": {"g": 2, "o": 5, "i": 4, "p": 1},
    "conv2d": {"g": 1, "o": 8, "i": 6, "p": 3, "q": 3},
    "conv2d-groups": {"g": 2, "o": 4, "i": 5, "p": 3, "q": 3},
    "conv2d-pointwise": {"g": 1, "o": 9, "i": 7, "p": 1, "q": 1},
    "conv2d-row": {"g": 1, "o": 6, "i": 7, "p": 1, "q": 3},
    "conv2d-narrowing": {"g": 1, "o": 2, "i": 11, "p": 2, "q": 2},
    "conv2d-widening": {"g": 1, "o": 11, "i": 2, "p": 2, "q": 2},
    "conv2d-depthwise": {"g": 4, "o": 2, "i": 1, "p": 3, "q": 5},
    "conv3d": {"g": 2, "o": 4, "i": 3, "p": 2, "q": 3, "z": 2},
}
"""Axis sizes of small weights of every kind, as :attr:`tdc.ir.Site.axes` gives them."""


def variants_of(name: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The variants that a decomposition proposes for a weight of these axes, and those that write the same fit."""
    d = decompositions.get(name)
    proposed = d.variants(axes)
    return tuple(dict.fromkeys((*proposed, *(same for v in proposed for same in d.same_fit(axes, v)))))


def applicable(axes: Mapping[str, int], *, by_default: bool = False) -> list[str]:
    """Names of the decompositions that propose a variant for a weight of these axes; ``by_default``: of those that are
    tried where none are named.
    """
    names = [name for name in decompositions.names() if decompositions.get(name).by_default or not by_default]
    return [name for name in names if variants_of(name, axes)]


def random_weight(rows: int, columns: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """A float64 weight (o, i) with singular values near 1, 1/2, 1/3, ...; with ``rank``, of exactly that rank."""
    generator = torch.Generator().manual_seed(1000 * seed + 31 * rows + columns)
    left = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    least = min(rows, columns) if rank is None else rank
    decay = 1 / torch.arange(1, least + 1, dtype=torch.float64)
    return (torch.linalg.qr(left).Q[:, :least] * decay) @ torch.linalg.qr(right).Q[:least]


def random_weight_of(axes: Mapping[str, int], *, rank: int | None = None, seed: int = 0) -> Tensor:
    """A float64 weight in canonical axes, (o, i) or (g o, i, window axes), of falling spectrum along every axis; with
    ``rank``, a sum of that many outer products in each group.
    """
    if "g" not in axes:
        return random_weight(axes["o"], axes["i"], rank=rank, seed=seed)
    generator = torch.Generator().manual_seed(1000 * seed + sum(3**k * n for k, n in enumerate(axes.values())))
    groups, *sizes = axes.values()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = []
    for _ in range(groups):
        if rank is not None:
            letters = "abcde"[: len(sizes)]
            text = f"{','.join(f'r{letter}' for letter in letters)}->{letters}"
            parts.append(torch.einsum(text, *(normal(rank, size) for size in sizes)))
            continue
        part = normal(*sizes)
        for k, size in enumerate(sizes):
            mix = torch.linalg.qr(normal(size, size)).Q * torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
            part = torch.tensordot(mix, part.movedim(k, 0), 1).movedim(0, k)
        parts.append(part)
    return torch.cat(parts)


def random_factors(layout: Layout, *, seed: int = 0) -> dict[str, Tensor]:
    """Normal float64 factors of a layout that has no index factors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in layout.shapes.items()}


def random_metric(
    columns: int, *, rank: int | None = None, seed: int = 0, groups: int = 0, centred: bool = False
) -> Metric:
    """The ``input`` metric of correlated random inputs; with ``rank``, a singular one that has seen so many
    directions. With ``groups``, as convolutions have it: one second moment for each. ``centred``: with a mean, which
    the bias takes up.
    """
    moments, means = [], []
    for group in range(max(1, groups)):
        generator = torch.Generator().manual_seed(77 * seed + columns + 1013 * group)
        inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
        mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
        if rank is not None:
            inputs[:, rank:] = 0
        inputs = inputs @ (mix + torch.eye(columns, dtype=torch.float64)) + (0.7 if centred else 0.0)
        mean = inputs.mean(0)
        inputs = inputs - mean if centred else inputs
        moments.append(inputs.T @ inputs / len(inputs))
        means.append(mean)
    if not groups:
        return Metric("input", moments[0], means[0] if centred else None)
    return Metric("input", torch.stack(moments), torch.stack(means) if centred else None)


def random_metric_of(
    axes: Mapping[str, int], *, rank: int | None = None, seed: int = 0, centred: bool = False
) -> Metric:
    """The same for a weight of these axes."""
    width = prod(size for axis, size in axes.items() if axis not in ("g", "o"))
    return random_metric(width, rank=rank, seed=seed, groups=axes.get("g", 0), centred=centred)


def random_site(
    weight: Tensor,
    *,
    order: int = 0,
    name: str = "layer.weight",
    uses: int = 1,
    groups: int = 1,
    windows: Sequence[Window] = (),
    bias: bool = False,
) -> Site:
    """The site that a frontend finds for ``weight``: linear, or a convolution with ``groups`` and ``windows`` (by
    default without stride, padding and dilation).
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.ndim == 2:
        sizes: tuple[tuple[str, int], ...] = (("o", weight.shape[0]), ("i", weight.shape[1]))
        return Site(OpKind.LINEAR, sizes, dtype, order, sketch(weight), (name,), uses, bias=bias)
    kind = (OpKind.CONV1D, OpKind.CONV2D, OpKind.CONV3D)[weight.ndim - 3]
    taps = tuple(zip(kind.windows, weight.shape[2:], strict=True))
    sizes = (("g", groups), ("o", weight.shape[0] // groups), ("i", weight.shape[1]), *taps)
    attributes = window_attributes(tuple(windows) or tuple(Window(axis, size) for axis, size in taps))
    return Site(kind, sizes, dtype, order, sketch(weight), (name,), uses, attributes, bias=bias)


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


def random_cnn(*, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Sequential:
    """A network for images (examples, 3, height, width): a convolution "0", one with stride and groups "3", one with
    dilation "6", a pointwise one "9" with a bias, a pool, and a linear head "13". A batch normalisation with random
    statistics follows each of the first three, which have no bias of their own unless ``bias``.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2, bias=bias), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=2, dilation=2, bias=bias), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12)),
    ]
    with torch.no_grad():
        for k, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                groups, (rows, *rest) = layer.groups, layer.weight.shape
                axes = dict(zip("goipq", (groups, rows // groups, *rest), strict=True))
                weight = random_weight_of(axes, seed=seed + k)
                layer.weight.copy_(weight * (rows / weight.square().sum()) ** 0.5)
            elif isinstance(layer, nn.Linear):
                layer.weight.copy_(random_weight(*layer.weight.shape, seed=seed + k))
            elif isinstance(layer, nn.BatchNorm2d):
                for tensor, low, high in (
                    (layer.running_mean, -0.5, 0.5),
                    (layer.running_var, 0.5, 2.0),
                    (layer.weight, 0.5, 1.5),
                    (layer.bias, -0.3, 0.5),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    return nn.Sequential(*layers).to(dtype).eval()


def matrix_of(weight: Tensor, groups: int = 1) -> np.ndarray:
    """A weight (g o, i, ...) as one float64 matrix (o, n) per group: (g, o, n)."""
    dense = weight.detach().double().numpy()
    return dense.reshape(groups, dense.shape[0] // groups, -1)


def _second_moments(metric: Metric, groups: int, width: int) -> np.ndarray:
    if metric.second_moment is None:
        return np.broadcast_to(np.eye(width), (groups, width, width))
    return metric.second_moment.double().numpy().reshape(groups, width, width)


def relative_error(weight: Tensor, approximation: Tensor, metric: Metric, groups: int = 1) -> float:
    """``sum_g tr(D S D^T) / (tr(W S W^T) + ||W mean||^2)`` with ``D = W - W_hat``; S is the identity for ``weight``."""
    dense, new = matrix_of(weight, groups), matrix_of(approximation, groups)
    second = _second_moments(metric, groups, dense.shape[2])
    lost, whole = 0.0, 0.0
    for g in range(groups):
        difference = dense[g] - new[g]
        lost += float(np.trace(difference @ second[g] @ difference.T))
        whole += float(np.trace(dense[g] @ second[g] @ dense[g].T))
        if metric.mean is not None:
            whole += float(np.sum((dense[g] @ metric.mean.double().numpy().reshape(groups, -1)[g]) ** 2))
    return lost / whole


def optimal_error(weight: Tensor, metric: Metric, rank: int | Sequence[int], groups: int = 1) -> float:
    """Least relative squared error of any weight of that matrix rank (in every group, or by group): the tail of the SVD
    of ``W L``, ``S = L L^T`` (Cholesky).

    For a singular S, ``L`` is its symmetric root.
    """
    dense = matrix_of(weight, groups)
    second = _second_moments(metric, groups, dense.shape[2])
    ranks = [rank] * groups if isinstance(rank, int) else rank
    lost, whole = 0.0, 0.0
    for g, kept in enumerate(ranks):
        try:
            root = np.linalg.cholesky(second[g])
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(second[g])
            root = vectors * np.sqrt(np.clip(values, 0, None))
        energy = np.linalg.svd(dense[g] @ root, compute_uv=False) ** 2
        lost, whole = lost + float(energy[kept:].sum()), whole + float(energy.sum())
        if metric.mean is not None:
            whole += float(np.sum((dense[g] @ metric.mean.double().numpy().reshape(groups, -1)[g]) ** 2))
    return lost / whole


def run_block(block: Block, factors: Mapping[str, Tensor], activation: Tensor) -> Tensor:
    """What ``block`` computes, op by op in float64, from an activation (rows, i), or (examples, channels, lengths...)
    for a convolution.
    """
    return torch.from_numpy(_trace(block, factors, activation)[0])


def count_macs(block: Block, factors: Mapping[str, Tensor], lengths: Sequence[int] = ()) -> int:
    """Multiply-adds for one activation row, or for one example with these ``lengths`` along the window axes, counted on
    the arrays: numbers that come out times numbers summed for each.
    """
    sizes = dict(block.sizes)
    return _trace(block, factors, torch.zeros(1, sizes.get("g", 1) * sizes["i"], *lengths))[1]


def _trace(block: Block, factors: Mapping[str, Tensor], activation: Tensor) -> tuple[np.ndarray, int]:
    constants = {name: f.double().numpy() if f.is_floating_point() else f.numpy() for name, f in factors.items()}
    values = {block.input: activation.double().numpy()}
    sizes, macs = dict(block.sizes), 0
    for op in block.ops:
        operands = [values[name] if name in values else constants[name] for name in op.inputs]
        own = _own_sizes(op, operands, sizes)
        values[op.output], numbers = _compute(op, operands, own)
        if op.equation is not None:
            macs += numbers * prod(own[axis] for axis in op.equation.contracted if axis in op.equation.inputs[1].axes)
    return values[block.output], macs


def _own_sizes(op: Op, operands: list[np.ndarray], sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Sizes of axes with those of the op's factor, which may be stored without an identity block."""
    if op.equation is None:
        return sizes
    own = dict(sizes)
    for group, length in zip(op.equation.inputs[1].groups, operands[1].shape, strict=True):
        own[group[-1]] = length // prod(sizes[axis] for axis in group[:-1])
    return own


def _compute(op: Op, operands: list[np.ndarray], sizes: Mapping[str, int]) -> tuple[np.ndarray, int]:
    """What an op gives, and how many numbers that are before any is cut off."""
    if op.kind == "weight":
        result = _built(op, operands, sizes)
    elif op.kind == "take":
        result = operands[0][:, operands[1][op.start : op.stop]]
    elif op.kind == "concat":
        result = np.concatenate(operands, axis=1)
    elif op.kind == "add":
        result = operands[0] + operands[1]
    elif op.kind == "conv":
        result = _convolve(op, operands[0], operands[1], sizes)
    else:
        assert op.kind in ("matmul", "contract")
        result = _product(op, operands[0], operands[1], sizes)
        return result[:, : op.stop or None], result.size
    return result, result.size


def _numbered(op: Op, windows: Sequence[str] = ()) -> list[list[int]]:
    """The axes of activation, factor and output of an op as numbers, ``windows`` left out."""
    assert op.equation is not None
    number = {axis: k for k, axis in enumerate(op.equation.axes)}
    terms = (*op.equation.inputs, op.equation.output)
    return [[number[axis] for axis in term.axes if axis not in windows] for term in terms]


def _product(op: Op, activation: np.ndarray, factor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Channels (rows, n), with zeros behind them where the axes hold more, times a factor."""
    assert op.equation is not None
    read, carried = ([sizes[axis] for axis in term.axes if axis != "b"] for term in op.equation.inputs)
    padded = np.pad(activation, [(0, 0), (0, prod(read) - activation.shape[1])])
    x, w, y = _numbered(op)
    product = np.einsum(padded.reshape(-1, *read), x, factor.reshape(carried), w, y)
    return product.reshape(len(activation), -1)


def _built(op: Op, operands: list[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    """The dense weight that an op builds from factors without identity blocks."""
    assert op.rebuild is not None
    assert not op.rebuild.pivots
    named, whole = dict(zip(op.inputs, operands, strict=True)), np.zeros(())
    for piece in op.rebuild.pieces:
        shapes = ([sizes[axis] for axis in term.axes] for term in piece.equation.inputs)
        arrays = [named[name].reshape(shape) for name, shape in zip(piece.operands, shapes, strict=True)]
        whole = whole + np.einsum(piece.equation.subscripts(), *arrays)
    whole = whole.reshape(op.rebuild.output.shape(sizes))
    return whole if "g" in sizes else whole[: sizes["o"], : sizes["i"]]


def _convolve(op: Op, activation: np.ndarray, factor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The convolution tap by tap: an entry of the input for every position, times the factor's matrix of that tap."""
    assert op.equation is not None
    axes, names = op.equation.inputs[1].axes, [w.axis for w in op.windows]
    carried = [axis for axis in axes if axis in names]
    window = {w.axis: w for w in op.windows}
    assert all(window[axis].size == sizes[axis] for axis in carried)
    assert all(w.axis in carried or w.size == 1 for w in op.windows if not w.trivial)
    pads = [w.padding(n) for w, n in zip(op.windows, activation.shape[2:], strict=True)]
    counts = [w.positions(n) for w, n in zip(op.windows, activation.shape[2:], strict=True)]
    padded = np.pad(activation, [(0, 0), (0, 0), *pads])
    kernel = factor.reshape([sizes[axis] for axis in axes])
    kernel = np.moveaxis(kernel, [axes.index(axis) for axis in carried], range(len(carried)))
    read = [sizes[axis] for axis in op.equation.inputs[0].axes if axis != "b" and axis not in names]
    (x, w, y), last = _numbered(op, names), len(op.equation.axes)
    total = np.zeros(())
    for tap in product(*(range(sizes[axis]) for axis in carried)):
        first = {axis: place * window[axis].dilation for axis, place in zip(carried, tap, strict=True)}
        places = tuple(
            slice(start := first.get(each.axis, 0), start + (count - 1) * each.stride + 1, each.stride)
            for each, count in zip(op.windows, counts, strict=True)
        )
        seen = padded[(slice(None), slice(None), *places)]
        seen = seen.reshape(len(seen), *read, -1)
        total = total + np.einsum(seen, [*x, last], kernel[tap], w, [*y, last])
    return total.reshape(len(activation), -1, *counts)


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
