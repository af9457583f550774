"""What the benchmarks share: result rows, the machine they were measured on, and shared data where it is there."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import tdc

__all__ = ["RESULTS", "read_rows", "resident_growth", "shared_data", "write_rows"]

RESULTS = Path(__file__).parent / "results"


def shared_data(name: str) -> Path:
    """A file of the data folder beside the checkout; SystemExit with the reason where it is missing."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
    if not path.exists():
        raise SystemExit(f"skipped: this benchmark needs {name} in ../shared/data")
    return path


def write_rows(benchmark: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``results/<benchmark>.csv`` anew: the rows, each with the machine, the versions, the commit and the date
    (those of rows that were read stay).
    """
    stamp = {
        "processor": _processor(),
        "torch": torch.__version__,
        "tdc": tdc.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in stamp)) + list(stamp)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({**stamp, **row} for row in rows)


def read_rows(benchmark: str) -> list[dict[str, str]]:
    """The rows of ``results/<benchmark>.csv``, [] where there is none."""
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


_RESIDENT = """
import sys, numpy, onnxruntime
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
before, settings = now(), onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, dict(numpy.load(sys.argv[2])))
print(now() - before)
"""


def resident_growth(path: Path, inputs: Mapping[str, np.ndarray]) -> int:
    """Bytes by which the resident set of a fresh process grows when it loads an ONNX file and runs it on ``inputs``."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **inputs)
        file.flush()
        command = [sys.executable, "-c", _RESIDENT, str(path), file.name]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    folder = Path(__file__).parent
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "tdc", "passes", "kernels"], cwd=folder.parent, capture_output=True, text=True
    )
    return answer.stdout.strip() + ("+" if dirty.stdout.strip() else "")
