"""One thread for planning and fitting while the model goes on running: one job at a time, and out of the way."""

from __future__ import annotations

import atexit
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable

import torch

__all__ = ["breathe", "submit"]

_SWITCH = 0.0005
"""Seconds after which the thread that works lets others run, while there is work; Python's own is 0.005."""
_BREATH = 0.0005
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
        interval, collects = sys.getswitchinterval(), gc.isenabled()
        sys.setswitchinterval(min(_SWITCH, interval))
        gc.disable()  # a full collection, which work brings about, stops every thread for a third of a second
        try:
            job()
        finally:
            sys.setswitchinterval(interval)
            if collects:
                gc.enable()
        del job  # it holds the model


def _use_one_thread() -> None:
    """In this thread alone: torch also keeps the number for threads to come, so another one puts that back."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))
    other.start()
    other.join()
