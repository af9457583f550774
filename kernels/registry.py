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
    from .triton import three_convolutions
    from .triton import two_products as on_gpu

    on_processor = (*two_products.KERNELS, *one_product.KERNELS, *convolutions.KERNELS)
    return (*on_processor, *on_gpu.KERNELS, three_convolutions.KERNEL)


def match(block: Block, device: str = "cpu") -> Match | Decline:
    """The first kernel that runs the block on a device of this machine, or why there is none."""
    reasons = []
    for kernel in (kernel for kernel in kernels() if kernel.device == device):
        found = kernel.match(block)
        if isinstance(found, Match):
            missing = kernel.available()
            return found if missing is None else missing
        reasons.append(found.reason)
    return Decline("no kernel: " + "; ".join(reasons) if reasons else f"no kernel for {device}")
