"""Products of float32 matrices by the faster of PyTorch's two libraries for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["fast_products"]

_SIZE, _RUNS = 512, 5
_GAIN, _EXACT = 0.8, 2e-6


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, oneDNN multiplies float32 matrices on the CPU in place of MKL, where that is faster on this machine and
    as exact. (MKL does not use AVX-512 on processors that are not Intel's: 0.45 of its time on an AMD EPYC.)

    PyTorch's setting for it, ``torch.set_float32_matmul_precision("medium")``, allows bfloat16, too; where oneDNN makes
    use of that, as with AMX, the products are not as exact, and all stays as it is. So it does where there is a GPU,
    for which the setting stands, too, and where the setting cannot be read (a mix of PyTorch's old and new ones).
    """
    before = _setting()
    if before is None or torch.cuda.is_available() or not torch.backends.mkldnn.is_available() or not _is_better():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _setting() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@cache
def _is_better() -> bool:
    """Measured once, on one product."""
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    first, second = (torch.randn(_SIZE, _SIZE, **plain) for _ in range(2))
    exact = first.double() @ second.double()
    own = _seconds(lambda: first @ second)
    torch.set_float32_matmul_precision("medium")
    try:
        error, other = float((first @ second - exact).norm() / exact.norm()), _seconds(lambda: first @ second)
    finally:
        torch.set_float32_matmul_precision(before)
    return other < _GAIN * own and error < _EXACT


def _seconds(run: Callable[[], Tensor]) -> float:
    run()
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
