"""Several runs of one model that go on side by side, from one site to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir import Site
from .program import Change

__all__ = ["Meet", "Visit", "in_step"]

Meet = Callable[[Site, Tensor, Tensor | None], Change | None]
"""Called in a run with a site, the activation that enters it, and the tensor that its output will be added to, where
that is known already (a residual connection); returns when all runs are there."""
Visit = Callable[[Site, Sequence[Tensor], Sequence[Tensor | None]], Change | None]
"""Called with a site and those of all runs, in their order; what it returns goes to all of them."""


class _StoppedError(BaseException):
    """Ends a run that nobody waits for any more."""


@dataclass(eq=False)
class _Run:
    """One run on a thread of its own, that goes on only while the main thread waits for it."""

    work: Callable[[Meet], Any]
    at: tuple[Site, Tensor, Tensor | None] | None = None
    done: bool = False
    failed: BaseException | None = None
    _answer: Change | None = None
    _stop: bool = False
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _parked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._main, name="tdc-lockstep", daemon=True)
        self._thread.start()
        self.step(None)

    def step(self, answer: Change | None) -> None:
        """Let it go on to its next site, or to its end."""
        self._answer = answer
        self._go.release()
        self._parked.acquire()

    def stop(self) -> None:
        self._stop = True
        if not self.done:
            self.step(None)
        self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        try:
            self.work(self._meet)
        except BaseException as error:
            self.failed = error
        self.done, self.at = True, None
        self._parked.release()

    def _meet(self, site: Site, activation: Tensor, beside: Tensor | None) -> Change | None:
        self.at = (site, activation, beside)
        self._parked.release()
        self._go.acquire()
        if self._stop:
            raise _StoppedError
        return self._answer


def in_step(works: Sequence[Callable[[Meet], Any]], sites: Iterable[Site], visit: Visit) -> str:
    """Run all works, each from site to site, and call ``visit`` whenever all have come to one, until all ``sites`` have
    been visited.

    One of them runs at a time. Returns why it was given up, '' where it was not. Raises what a work raises.
    """
    runs, rest = [_Run(work) for work in works], {site.order for site in sites}
    started: list[_Run] = []
    try:
        for run in runs:
            started.append(run)
            run.start()
        while not all(run.done for run in runs):
            failed = next((run.failed for run in runs if run.failed is not None), None)
            if failed is not None:
                raise failed
            places = [run.at for run in runs if run.at is not None]
            if len(places) < len(runs) or len({site.order for site, *_ in places}) > 1:
                return "the batches do not reach the sites in one order"
            answer = visit(places[0][0], [activation for _, activation, _ in places], [beside for *_, beside in places])
            rest.discard(places[0][0].order)
            if not rest:
                return ""
            del places
            for run in runs:
                run.step(answer)
        failed = next((run.failed for run in runs if run.failed is not None), None)
        if failed is not None:
            raise failed
        return ""
    finally:
        for run in started:
            run.stop()
