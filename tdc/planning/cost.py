"""What a site costs, dense and replaced."""

from __future__ import annotations

import math

from ..ir import Block, Cost, Layout, Site
from ..ir.layout import INDEX_BYTES

__all__ = ["ITEMSIZE", "block_cost", "dense_cost"]

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dense_cost(site: Site, rows: float) -> Cost:
    """Cost of the dense site; ``rows`` activation rows pass through it per example, all uses together."""
    return Cost(site.params, site.params * ITEMSIZE[site.dtype], site.params * rows)


def block_cost(site: Site, layout: Layout, block: Block, rows: float) -> Cost:
    """Cost of ``block``: what its factors store (index factors are bytes, not parameters), multiply-adds of its
    steps.
    """
    real = sum(math.prod(shape) for name, shape in block.factors if name in layout.rebuild.factors)
    index = sum(math.prod(shape) for name, shape in block.factors if name == layout.rebuild.index)
    return Cost(real, real * ITEMSIZE[site.dtype] + index * INDEX_BYTES, block.macs * rows)
