"""Tables of measured times: JSON files, one for each fingerprint of the machine, in a private folder of the user."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DestinationError, TargetError
from ..files import atomic_write
from ..ir import Decline
from ..ir.machine import Table, Timing, Work

__all__ = ["check", "fingerprint", "folder", "found", "load", "made_folder", "path_of", "save", "to_json"]

VERSION = 1
_FORMAT = "tdc-table"
_LARGEST = 1 << 24
_SOURCES = Path(__file__).parents[1] / "kernels" / "c"
_FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve", "v")
_KEYS = frozenset({"format", "version", "fingerprint", "date", "drift", "noisy", "left_out", "timings"})


def fingerprint() -> Mapping[str, str]:
    """What times depend on here: the processor, the threads that torch uses now, its version and libraries, and TDC's
    kernels.
    """
    return {**_machine(), "threads": str(torch.get_num_threads())}


@functools.cache
def _machine() -> Mapping[str, str]:
    facts = {"model name": platform.processor() or platform.machine(), "flags": ""}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        key, _, value = line.partition(":")
        if (name := {"Features": "flags"}.get(key.strip(), key.strip())) in facts:
            facts[name] = value.strip()
    flags = set(facts["flags"].split())
    libraries = hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:12]
    return {
        "processor": facts["model name"],
        "cores": str(os.cpu_count() or 0),
        "isa": " ".join(flag for flag in _FLAGS if flag in flags),
        "torch": str(torch.__version__),
        "libraries": f"{torch.backends.cpu.get_cpu_capability()} {libraries}",
        "kernels": _kernels(),
        "schema": str(VERSION),
    }


def _kernels() -> str:
    """A digest of the source of TDC's own kernels."""
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".c", ".h"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def folder() -> Path:
    """``$XDG_CACHE_HOME/tdc/targets``, else ``~/.cache/tdc/targets``; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tdc" / "targets"


def path_of(table: Table) -> Path:
    """Where a table is kept."""
    return folder() / f"{table.key}.json"


def found() -> Table | Decline | None:
    """The table of this machine as it is now; a reason where there are tables, but none that fits; None without any."""
    try:
        own = folder()
        if not own.is_dir():
            return None
        if not _is_private(own):
            return Decline(f"the tables of times in {own} are not read: others may write there")
        wanted = path_of(Table(fingerprint(), {}))
        if wanted.exists():
            table = load(wanted)
            check(table, str(wanted))
            return table
        others = sorted(own.glob("*.json"))
    except (OSError, RuntimeError):
        return None
    except TargetError as error:
        return Decline(f"{error}; 'tdc target measure' makes a new one")
    if not others:
        return None
    try:
        why = "; ".join(differences(load(others[0]).fingerprint))
    except TargetError as error:
        why = str(error)
    return Decline(f"the tables of times in {own} are not for this machine as it is now: {why}")


def check(table: Table, name: str) -> None:
    """Raise TargetError unless the table was measured on this machine as it is now."""
    if differing := differences(table.fingerprint):
        raise TargetError(f"the table of times {name} is of another machine: {'; '.join(differing)}")


def differences(other: Mapping[str, str]) -> list[str]:
    """In what a fingerprint differs from that of this machine."""
    here = fingerprint()
    keys = dict.fromkeys((*here, *other))
    return [
        f"{key} {other.get(key, 'unknown')!r}, here {here.get(key, 'unknown')!r}"
        for key in keys
        if other.get(key) != here.get(key)
    ]


def save(table: Table, path: str | Path | None = None) -> Path:
    """Write a table, all or nothing; by default where it is found again. Raises DestinationError."""
    where = Path(path) if path is not None else made_folder() / path_of(table).name
    atomic_write(where, to_json(table).encode())
    return where


def made_folder() -> Path:
    """:func:`folder`, made where it is not there. Raises DestinationError unless it is the user's alone."""
    own = folder()
    try:
        own.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (own.parent, own):
            part.mkdir(mode=0o700, exist_ok=True)
        private = _is_private(own) and _is_private(own.parent)
    except OSError as error:
        raise DestinationError(f"the folder {own} cannot be made: {error.strerror or error}") from error
    if not private:
        raise DestinationError(f"the folder {own} is not yours alone (mode 0700): no table is kept there")
    return own


def to_json(table: Table) -> str:
    """The table as a JSON text, one operation a line."""
    head: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "fingerprint": dict(table.fingerprint),
        "date": table.date,
        "drift": table.drift,
        "noisy": table.noisy,
        "left_out": table.left_out,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    rows = [
        json.dumps([work.kind, work.dtype, list(work.sizes), timing.least, timing.median], allow_nan=False)
        for work, timing in table.timings.items()
    ]
    body = ",\n    ".join(rows)
    lines.append(f'"timings": [\n    {body}\n  ]')
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


def load(path: str | Path) -> Table:
    """Read what :func:`save` wrote. Raises TargetError with the file and the place; nothing in it is trusted."""
    try:
        known = os.stat(path)
    except (OSError, ValueError) as error:
        raise TargetError(f"the table of times {str(path)[:200]} cannot be read: {error}") from error
    if not stat.S_ISREG(known.st_mode) or known.st_size > _LARGEST:
        raise TargetError(f"the table of times {path} is no plain file of at most {_LARGEST} bytes")
    return _load(str(path), known.st_mtime_ns, known.st_size, known.st_ino)


@functools.lru_cache(maxsize=16)
def _load(path: str, *version: int) -> Table:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"the table of times {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != VERSION:
        raise TargetError(f"{path} is no table of times of version {VERSION}")
    if unknown := sorted(set(data) - _KEYS):
        raise TargetError(f"{path}: {unknown[0]!r} is no key")
    try:
        marks = {str(key): str(value) for key, value in data["fingerprint"].items()}
        timings = dict(_row(row) for row in data["timings"])
        drift, noisy, left_out = data["drift"], data["noisy"], data["left_out"]
        if not _number(drift) or not isinstance(noisy, bool) or not isinstance(left_out, int) or not timings:
            raise ValueError("drift, noisy, left_out or timings")
        return Table(marks, timings, str(data["date"]), float(drift), noisy, left_out)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TargetError(f"the table of times {path} lacks or misspells {error}") from error


def _row(row: Any) -> tuple[Work, Timing]:
    kind, dtype, sizes, *seconds = row
    good = isinstance(kind, str) and isinstance(dtype, str) and all(_number(s) and s > 0 for s in (*sizes, *seconds))
    if not good or len(seconds) != 2 or seconds[0] > seconds[1]:
        raise ValueError(f"the timing {str(row)[:120]}")
    return Work(kind, tuple(float(size) for size in sizes), dtype), Timing(float(seconds[0]), float(seconds[1]))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _is_private(path: Path) -> bool:
    known = os.lstat(path)
    return stat.S_ISDIR(known.st_mode) and known.st_uid == os.geteuid() and not known.st_mode & 0o077
