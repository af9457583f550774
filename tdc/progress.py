"""Progress on long work: a bar on standard error once something takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["counted", "track"]

T = TypeVar("T")


def track(items: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield ``items``; with ``show``, draw a bar after two seconds (a line every so often where no terminal is
    there).
    """
    count = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    with counted(what, count, show=show) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def counted(what: str, total: int | None, *, show: bool = True) -> Iterator[Callable[[], None]]:
    """The same for work that is no loop: call what this gives after each piece of it."""
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else 10.0
    with tqdm(
        desc=f"tdc: {what}", total=total, delay=2.0, mininterval=interval, leave=False, dynamic_ncols=terminal
    ) as bar:

        def advance() -> None:
            bar.update()

        yield advance
