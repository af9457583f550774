"""What a site costs, dense and replaced."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..ir import Block, Cost, Layout, Site
from ..ir.layout import INDEX_BYTES

__all__ = ["ITEMSIZE", "block_cost", "dense_cost"]

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dense_cost(site: Site, rows: float, ratios: Mapping[str, float] | None = None) -> Cost:
    """Cost of the dense site; ``rows`` activation rows or output positions pass through it per example, all uses
    together, with ``ratios`` entries of the input per position along each window axis.
    """
    groups, outputs, width = site.matrix
    inputs = site.axes["i"] * groups * math.prod((ratios or {}).values())
    live = (inputs + groups * outputs) * rows * ITEMSIZE[site.dtype]
    return Cost(site.params, site.params * ITEMSIZE[site.dtype], groups * outputs * width * rows, round(live))


def block_cost(
    site: Site,
    layout: Layout,
    block: Block,
    rows: float,
    ratios: Mapping[str, float] | None = None,
    without: Collection[str] = (),
) -> Cost:
    """Cost of ``block``: what its factors store (index factors are bytes, not parameters), multiply-adds of its
    steps, and the most bytes of activations that live at a time while it runs (with the dense weight, where every call
    builds it).

    ``without``: factors that are counted elsewhere, and so is what follows from them and the input alone.
    """
    known = ratios or {}
    own = [(name, math.prod(shape)) for name, shape in block.factors if name not in without]
    real = sum(numbers for name, numbers in own if name in layout.rebuild.factors)
    index = sum(numbers for name, numbers in own if name in layout.rebuild.indices)
    size = ITEMSIZE[site.dtype]
    live = block.peak_at(known) * rows * size
    macs = block.macs_at(known, block.values_of(without) if without else ()) * rows
    if block.execution == "rebuilt":
        macs += block.rebuild_macs
        live += site.params * size
    return Cost(real, real * size + index * INDEX_BYTES, macs, round(live))
