"""Progress on long work: a bar on standard error once something takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield ``items``; with ``show``, draw a bar after two seconds (a line every so often where no terminal is
    there).
    """
    if not show:
        yield from items
        return
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    count = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    interval = 0.1 if terminal else 10.0
    yield from tqdm(
        items, desc=f"tdc: {what}", total=count, delay=2.0, mininterval=interval, leave=False, dynamic_ncols=terminal
    )
