"""Memory of this process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["give_back"]


def give_back() -> None:
    """Hand freed memory back to the system. The allocator of glibc keeps blocks of up to 32 MB, and of each thread for
    itself: after fits in lockstep that is more than what is in use. Does nothing elsewhere.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
