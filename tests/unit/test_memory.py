from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tdc.memory import _trim, give_back

RETAINING = """
import resource, torch
from tdc.memory import give_back
def used(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
del (first := [torch.ones(1 << 20)])[:]
blocks = [torch.ones(1 << 20) for _ in range(64)]
pin = torch.ones(1 << 20)
del blocks
before = used()
give_back()
print(before - used())
"""


@pytest.mark.skipif(_trim() is None or not Path("/proc/self/statm").exists(), reason="not the allocator of glibc")
def test_freed_memory_goes_back() -> None:
    """64 blocks of 4 MB below one that is in use, in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", RETAINING], capture_output=True, text=True, check=True)
    assert float(ran.stdout) > 128


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for found in (calls.append, None):
        monkeypatch.setattr("tdc.memory._trim", lambda found=found: found)
        give_back()
    assert calls == [0]
