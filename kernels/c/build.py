"""C source to a loaded library: compiled at first use, and kept, by the hash of its content, in a folder of the user.

Only source that comes with TDC is compiled. Where anything is missing the answer is a :class:`~tdc.ir.Decline`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdc.ir import Decline

__all__ = ["build", "cache_folder", "compiler", "load"]

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden")
THREADS = ("-pthread", "-DTDC_THREADS")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(\w[\w.]*)"', re.MULTILINE)
LONGEST = 120
"""Seconds after which a compiler is stopped."""


@functools.cache
def load(source: Path) -> ctypes.CDLL | Decline:
    """The library of a C source, built where it is not in the cache. One answer for the life of the process."""
    return build(source)


def build(source: Path, folder: Path | None = None) -> ctypes.CDLL | Decline:
    """As :func:`load`, asked anew; ``folder``: where to keep the library, a private one (default:
    :func:`cache_folder`).
    """
    if os.name != "posix":
        return Decline(f"the C kernels are for POSIX systems, not for {os.name}")
    command = compiler()
    if isinstance(command, Decline):
        return command
    version = _version(command)
    if isinstance(version, Decline):
        return version
    texts = _texts(source)
    folder = folder or cache_folder()
    answer: ctypes.CDLL | Decline = Decline("no set of flags")
    for flags in ((*FLAGS, *THREADS), FLAGS):
        path = folder / f"{source.stem}-{_key(texts, flags, command, version)}.so"
        kept = _opened(path) if _is_own_file(path) else None
        answer = kept if isinstance(kept, ctypes.CDLL) else _compiled(texts, command, flags, path)
        if isinstance(answer, ctypes.CDLL):
            return answer
    return answer


def compiler() -> tuple[str, ...] | Decline:
    """The command of a C compiler: that of ``CC``, else the first of cc, gcc, clang that is there."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        return Decline(f"CC cannot be read: {error}")
    for first, *others in [given] if given else [[name] for name in COMPILERS]:
        found = shutil.which(first)
        if found:
            return (found, *others)
    return Decline(f"no C compiler: {'CC names ' + given[0] if given else ', '.join(COMPILERS)}, not found")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/tdc/kernels``, else ``~/.cache/tdc/kernels``, if it and ``tdc`` above it belong to the user and
    nobody else may enter; else a temporary folder that goes when the process ends.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        folder = root / "tdc" / "kernels"
        root.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, exist_ok=True)
        private = _is_private(folder) and _is_private(folder.parent) and os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # read-only, a file in the way, no home
        private = False
    return folder if private else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tdc-kernels-")  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_private(folder: Path) -> bool:
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _is_own_file(path: Path) -> bool:
    """Whether there is a plain file that nobody else could have written."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _version(command: Sequence[str]) -> str | Decline:
    answer = _run([*command, "--version"])
    return answer if isinstance(answer, Decline) else answer.stdout


def _texts(source: Path) -> dict[str, str]:
    """The source and what it includes from its own folder, by name; the source comes first."""
    texts: dict[str, str] = {}
    waiting = [source.name]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (source.parent / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(texts[name])
    return texts


def _key(texts: Mapping[str, str], flags: Sequence[str], command: Sequence[str], version: str) -> str:
    parts = (
        *(part for pair in texts.items() for part in pair),
        *flags,
        *command,
        version,
        sys.platform,
        platform.machine(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compiled(
    texts: Mapping[str, str], command: Sequence[str], flags: Sequence[str], path: Path
) -> ctypes.CDLL | Decline:
    """Compile beside ``path``, then rename: of two processes that build at once, both win."""
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as work:
            library = Path(work) / "kernel.so"
            for name, text in texts.items():
                (Path(work) / name).write_text(text, encoding="utf-8")
            answer = _run([*command, *flags, str(Path(work) / next(iter(texts))), "-o", str(library), "-lm"])
            if isinstance(answer, Decline):
                return answer
            os.chmod(library, 0o700)
            with library.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(library, path)
    except OSError as error:
        return Decline(f"the C kernels cannot be built in {path.parent}: {error.strerror or error}")
    return _opened(path)


def _opened(path: Path) -> ctypes.CDLL | Decline:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return Decline(f"the C kernels cannot be loaded: {str(error)[:200]}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | Decline:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=LONGEST,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return Decline(f"the C compiler {name} took more than {LONGEST} s")
    except (OSError, ValueError) as error:
        return Decline(f"the C compiler {name} cannot be run: {error}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        return Decline(f"the C compiler {name} failed ({done.returncode}): {lines[0][:200]}")
    return done
