"""The threads that help a call: those that torch has, no others; they change no result."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdc.kernels.c.two_products import run

pytestmark = pytest.mark.usefixtures("compiled")

TASKS = Path("/proc/self/task")


def operands(seed: int = 0) -> tuple[Tensor, ...]:
    """Enough for several threads."""
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=made) for shape in ((3, 700), (400, 700), (900, 400), (900,)))


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def alone(given: tuple[Tensor, ...]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(*given)
    torch.set_num_threads(threads)
    return result


@pytest.mark.usefixtures("three")
def test_calls_from_several_threads_at_once_are_right() -> None:
    given = [operands(seed) for seed in range(4)]
    right = [alone(one) for one in given]
    wrong: list[int] = []

    def call(place: int) -> None:
        torch.set_num_threads(3)
        for _ in range(100):
            if not torch.equal(run(*given[place]), right[place]):
                wrong.append(place)

    callers = [threading.Thread(target=call, args=(place,)) for place in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


@pytest.mark.usefixtures("three")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_does_without() -> None:
    code = """
import os, torch
from tdc.kernels.c.two_products import run
x, first, second = torch.randn(3, 700), torch.randn(400, 700), torch.randn(900, 400)
right = run(x, first, second)
torch.set_num_threads(3)
for _ in range(20):
    run(x, first, second)
child = os.fork()
same = all(torch.equal(run(x, first, second), right) for _ in range(20))
if child == 0:
    os._exit(0 if same else 3)
print(same, os.waitpid(child, 0)[1])
"""
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run_.stdout.split() == ["True", "0"], run_.stderr


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_the_threads_are_those_of_torch() -> None:
    code = """
import os, torch
from tdc.kernels.c.two_products import run
x, first, second = torch.randn(3, 700), torch.randn(400, 700), torch.randn(900, 400)
large = torch.randn(600, 600)
counts = []
def count(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    counts.append(len(os.listdir("/proc/self/task")) - before)
calls = [lambda: run(x, first, second), lambda: large + large, lambda: large @ large]
for threads, order in (1, calls), (3, calls), (4, calls[::-1]):
    torch.set_num_threads(threads)
    for call in order:
        count(call)
count(lambda: run(x[:, :20], first[:20, :20], second[:20, :20]))
print(*counts)
"""
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run_.stdout.split() == ["0", "0", "0", "2", "0", "0", "1", "0", "0", "0"], run_.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_on_one_core_the_caller_does_the_work() -> None:
    code = """
import os, torch
from tdc.kernels.c.two_products import run
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
x, first, second = torch.randn(3, 700), torch.randn(400, 700), torch.randn(900, 400)
torch.set_num_threads(1)
right = run(x, first, second)
torch.set_num_threads(8)
print(all(torch.equal(run(x, first, second), right) for _ in range(50)))
"""
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run_.stdout.split() == ["True"], run_.stderr
