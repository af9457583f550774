"""What a site costs, dense and replaced."""

from __future__ import annotations

from ..ir import Block, Cost, Layout, Site

__all__ = ["ITEMSIZE", "block_cost", "dense_cost"]

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dense_cost(site: Site, rows: float) -> Cost:
    """Cost of the dense site; ``rows`` activation rows pass through it per example, all uses together."""
    return Cost(site.params, site.params * ITEMSIZE[site.dtype], site.params * rows)


def block_cost(site: Site, layout: Layout, block: Block, rows: float) -> Cost:
    """Cost of ``block``: parameters and bytes from the layout, multiply-adds counted in the block's own steps."""
    return Cost(layout.params, layout.bytes(ITEMSIZE[site.dtype]), block.macs * rows)
