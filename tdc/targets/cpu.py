"""Processors: stock matrix products."""

from __future__ import annotations

from .base import Target

__all__ = ["CPU"]


class CPU(Target):
    """Any processor with a BLAS. Ranks in multiples of 8, one AVX register of float32."""

    name = "cpu"
    summary = "stock matrix products; ranks in multiples of 8"
    rank_multiple = 8
