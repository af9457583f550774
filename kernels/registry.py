"""All kernels, and the one that fits a block."""

from __future__ import annotations

import functools

from tdc.ir import Block, Decline

from .base import Kernel, Match

__all__ = ["kernels", "match"]


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel."""
    from .c import convolutions, one_product, two_products

    return (*two_products.KERNELS, *one_product.KERNELS, *convolutions.KERNELS)


def match(block: Block) -> Match | Decline:
    """The first kernel that runs the block on this machine, or why there is none."""
    reasons = []
    for kernel in kernels():
        found = kernel.match(block)
        if isinstance(found, Match):
            missing = kernel.available()
            return found if missing is None else missing
        reasons.append(found.reason)
    return Decline("no kernel: " + "; ".join(reasons))
