"""The kernels: they match equations and know no decomposition.

``match(block)`` gives the kernel that runs a block, or the reasons why none does; ``accelerate(model)`` lets the
linear and factored layers of a model use kernels where they are measured to be faster. Nothing is compiled before it is
needed.
"""

if __name__ != "tdc.kernels":
    raise ImportError(
        f"this folder is the package 'tdc.kernels': write 'import tdc.kernels' instead of 'import {__name__}'"
    )

from .base import Kernel, Match
from .layers import accelerate
from .registry import kernels, match

__all__ = ["Kernel", "Match", "accelerate", "kernels", "match"]
