"""One thread for planning and fitting while the model goes on running: one job at a time, and out of the way."""

from __future__ import annotations

import atexit
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["SWITCH", "breathe", "submit"]

SWITCH = 0.00005
"""Seconds after which the thread that works lets others run, while there is work; Python's own is 0.005."""
_BREATH = 0.0005
_NEVER = 1 << 30
_PATIENCE = 60.0

_jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_start = threading.Lock()
_ending = threading.Event()
_worker: threading.Thread | None = None


def submit(job: Callable[[], None]) -> None:
    """Run ``job`` behind those that were submitted before. It must not raise."""
    global _worker
    with _start:
        if _worker is None or not _worker.is_alive():
            _worker = threading.Thread(target=_work, name="tdc", daemon=True)
            _worker.start()
            atexit.register(_finish)
    _jobs.put(job)


def breathe() -> None:
    """To be called between steps of long work: lets other threads run. Does nothing in any thread but that of jobs."""
    if threading.current_thread() is _worker:
        if _ending.is_set():
            raise InterruptedError("the process ends")
        time.sleep(_BREATH)


def _finish() -> None:
    """Let the job in hand stop at its next breath: a thread that is inside torch as the process ends, aborts it."""
    _ending.set()
    if _worker is not None:
        _jobs.put(lambda: None)
        _worker.join(_PATIENCE)


def _work() -> None:
    _use_one_thread()
    while not _ending.is_set():
        job = _jobs.get()
        with _out_of_the_way():
            job()
        del job  # it holds the model


@contextmanager
def _out_of_the_way() -> Iterator[None]:
    """Other threads wait for this one as little as Python allows: they soon get the interpreter, and no collection of
    garbage goes through the whole heap, which takes a third of a second and stops them all.
    """
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    frozen = gc.isenabled() and not gc.get_freeze_count()  # else somebody else uses that
    sys.setswitchinterval(min(SWITCH, interval))
    if frozen:
        gc.set_threshold(*thresholds[:2], _NEVER)
        gc.freeze()
    try:
        yield
    finally:
        if frozen:
            gc.collect()  # of what came since
            gc.unfreeze()
            gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)


def _use_one_thread() -> None:
    """In this thread alone: torch also keeps the number for threads to come, so another one puts that back."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))
    other.start()
    other.join()
