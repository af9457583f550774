"""What a block does on a machine: its operations at their sizes, for one call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..ir import Block, Cost, Op, Site, conv_groups, conv_shape
from ..ir.machine import Work
from ..ir.verify import verify_block

__all__ = ["Call", "call_of", "conv_work", "dense_block", "products", "rows_of", "works_of"]


@dataclass(frozen=True)
class Call:
    """One use of a site: ``examples`` rows of activations, or examples with ``plane`` output positions each, with
    ``ratios`` entries of the input per position along each window axis. ``layout``: memory format, or ''.
    """

    examples: float
    plane: float = 1.0
    ratios: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    layout: str = ""

    @property
    def rows(self) -> float:
        return self.examples * self.plane


def call_of(site: Site, rows: float, ratios: Mapping[str, float] | None = None) -> Call:
    """The call of each use, where ``rows`` rows or positions pass through all uses together."""
    own = max(rows / max(site.uses, 1), 1.0)
    if not site.kind.is_conv:
        return Call(own, dtype=site.dtype)
    plane = min(float(math.prod(positions for _, _, positions in site.lengths) if site.lengths else own), own)
    known = {axis: entries / positions for axis, entries, positions in site.lengths if positions}
    known = dict(ratios or {}) or known or {window.axis: float(window.stride) for window in site.windows}
    return Call(own / plane, plane, tuple(known.items()), site.dtype, site.layout)


def rows_of(site: Site, dense: Cost) -> float:
    """The rows with which :func:`tdc.planning.cost.dense_cost` was counted; one for each use where it was not."""
    each = math.prod(site.matrix)
    return dense.macs / each if dense.macs and each else float(site.uses)


@lru_cache(maxsize=1024)
def dense_block(site: Site) -> Block:
    """The operator that the site has, as a block."""
    kind, term = site.kind, site.kind.dense.inputs[1]
    op = Op("conv" if kind.is_conv else "matmul", "y", ("x", "w"), kind.dense, windows=site.windows)
    block = Block((("w", term.shape(site.axes)),), (op,), "y", site.sizes, kind=kind)
    verify_block(block)
    return block


def works_of(block: Block, call: Call, without: Collection[str] = ()) -> Iterator[tuple[Op, tuple[Work, ...]]]:
    """Every operation of one call with what it takes; those of the values ``without`` are left out, and a weight that
    is stored takes nothing.
    """
    shapes: dict[str, Sequence[int]] = dict(block.factors)
    sizes, planes = dict(block.sizes), block.positions_at(dict(call.ratios))
    widths = block.widths()
    for op in block.ops:
        if op.kind == "weight":
            shapes[op.output] = block.kind.dense.inputs[1].shape(sizes)
            if block.execution == "rebuilt":
                numbers = sum(math.prod(shapes[name]) for name in op.inputs) + math.prod(shapes[op.output])
                yield op, (Work("rebuild", (float(max(block.rebuild_macs, 1)), float(numbers)), call.dtype),)
            continue
        if op.output in without:
            continue
        plane, width = call.plane * planes[op.output], float(widths[op.output])
        if op.kind == "conv":
            read = planes[op.inputs[0]] / planes[op.output]
            yield op, (_conv(op, conv_shape(op, tuple(shapes[op.inputs[1]])), sizes, call, plane, read),)
        elif op.kind == "matmul":
            outputs, inputs = shapes[op.inputs[1]]
            yield op, products(call.examples, 1, 1, inputs, outputs, call.dtype)
        elif op.kind == "contract":
            yield op, _contract(op, sizes, call)
        elif block.kind.is_conv and op.kind == "take":
            yield op, (Work("take planes", (call.examples, plane, width), call.dtype),)
        elif block.kind.is_conv:
            yield op, (Work(op.kind, (call.examples, plane * width), call.dtype),)
        else:
            yield op, (Work(op.kind, (call.examples, width), call.dtype),)


def products(
    rows: float, batch: float, others: float, inputs: float, outputs: float, dtype: str, moved: bool = False
) -> tuple[Work, ...]:
    """The product of an activation of (rows, batch, others, inputs) with a factor (batch, outputs, inputs); ``moved``:
    its axes have to be put in another order, and back.
    """
    rows = rows * others
    if batch == 1 and not moved and others == 1:
        return (Work("gemm", (float(rows), float(inputs), float(outputs)), dtype),)
    size = {"float64": 8, "float32": 4}.get(dtype, 2)
    copies = [Work("copy", (2.0 * size * rows * batch * width,), dtype) for width in (inputs, outputs)]
    if batch == 1:
        return (copies[0], Work("gemm", (float(rows), float(inputs), float(outputs)), dtype), copies[1])
    return (copies[0], Work("bmm", (float(batch), float(rows), float(inputs), float(outputs)), dtype), copies[1])


def conv_work(
    taps: Sequence[int],
    slide: str,
    call: tuple[float, float, float],
    groups: int,
    inputs: int,
    outputs: int,
    dtype: str,
) -> Work:
    """A convolution; ``slide``: how, where that is not by one entry at a time, e.g. ``/2``; ``call``: examples,
    positions of the output, entries of the input per position; ``inputs`` and ``outputs`` of each group.
    """
    examples, plane, read = call
    window = "x".join(map(str, taps if len(taps) > 1 else (1, *taps))) + slide
    if groups == 1:
        sizes: tuple[float, ...] = (examples, plane, float(inputs), float(outputs))
        return Work(f"conv {window}", sizes, dtype, read)
    if inputs == 1 and outputs == 1:
        return Work(f"depthwise {window}", (examples, plane, float(groups)), dtype, read)
    return Work(f"grouped {window}", (examples, plane, float(inputs), float(outputs), float(groups)), dtype, read)


def _conv(op: Op, shape: tuple[int, ...], sizes: Mapping[str, int], call: Call, plane: float, read: float) -> Work:
    groups = conv_groups(op, sizes)
    strides = dict.fromkeys(window.stride for window in op.windows)
    notes = ["dilated"] if any(window.dilation > 1 for window in op.windows) else []
    notes += [call.layout] if call.layout else []
    step = "x".join(map(str, strides))
    slide = f"/{' '.join([step, *notes])}" if notes or step != "1" else ""
    return conv_work(shape[2:], slide, (call.examples, plane, read), groups, shape[1], shape[0] // groups, call.dtype)


def _contract(op: Op, sizes: Mapping[str, int], call: Call) -> tuple[Work, ...]:
    assert op.equation is not None
    activation, factor = (set(term.axes) - {"b"} for term in op.equation.inputs)
    output = set(op.equation.output.axes)

    def size(axes: set[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    both = activation & factor
    batch, inputs = size(both & output), size(both - output)
    return products(call.examples, batch, size(activation - factor), inputs, size(factor - both), call.dtype, True)
