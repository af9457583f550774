"""Another project that also installs a package named ``tdc`` (PyTDC does) must not mix with this one unnoticed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

__all__ = ["check"]

_OURS = "tensor-decomposition-compiler"


def check() -> None:
    """Raise ImportError if ``import tdc`` gives another project's package, or a folder that holds both projects' files.

    pip notices neither. Without the check, some files of each project would run. Another project's ``tdc`` that lies
    later on the path is harmless. So is metadata that cannot be read.
    """
    folder = Path(__file__).parent
    problem = _shadowed(folder, sys.modules.get(folder.name)) or _mixed(folder)
    if problem:
        raise ImportError(problem)


def _shadowed(folder: Path, loaded: ModuleType | None) -> str:
    """What is wrong if ``loaded``, the package in use, does not lie in ``folder``; '' if it does."""
    file = getattr(loaded, "__file__", None)
    if not file or Path(file).resolve().parent == folder.resolve():
        return ""
    place = Path(file).parent
    others = sorted(_owners(place.parent, place.name))
    return (
        f"'import {folder.name}' gives {place}, the package of {' and '.join(others) or 'another project'}, instead of "
        f"{folder}, the package of {_OURS}. Keep them in separate virtual environments, or remove the other one:\n"
        f"  pip uninstall {' '.join(others) or 'PROJECT'}"
    )


def _mixed(folder: Path) -> str:
    """What is wrong if another distribution has installed its files into ``folder``; '' if none has."""
    others = sorted(_owners(folder.parent, folder.name))
    if not others:
        return ""
    return (
        f"the folder {folder} holds files of {' and '.join(others)} as well as of {_OURS}: both install a package "
        f"named {folder.name!r} and overwrite each other. Keep them in separate virtual environments, or remove both "
        f"and install one of them again:\n  pip uninstall {' '.join(others)} {_OURS}"
    )


def _owners(site: Path, package: str) -> Iterator[str]:
    """Names of the distributions other than ours whose metadata in ``site`` claims ``package/__init__.py``."""
    try:
        entries = os.listdir(site)
    except OSError:
        return
    for entry in entries:
        stem, _, kind = entry.rpartition(".")
        if kind not in ("dist-info", "egg-info") or entry.startswith("~"):  # pip renames to ~name while it uninstalls
            continue
        ours = (re.sub(r"[-_.]+", "-", stem) + "-").lower().startswith(_OURS + "-")
        if not ours and _claims(site / entry, package):
            yield stem.split("-")[0]


def _claims(metadata: Path, package: str) -> bool:
    """Whether top_level.txt has the package; without top_level.txt (a long RECORD is slow), whether RECORD lists it."""
    names = _read(metadata / "top_level.txt").split()
    if names:
        return package.encode() in names
    line, record = f"{package}/__init__.py,".encode(), _read(metadata / "RECORD")
    return record.startswith(line) or b"\n" + line in record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
