"""Writing files all or nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import DestinationError

__all__ = ["atomic_write", "checked_destination"]


def checked_destination(path: str | Path) -> Path:
    """The path, if a file can be put there. Raises DestinationError: no such folder, a folder, a symbolic link."""
    target = Path(path)
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise DestinationError(f"{str(path)[:80]!r} cannot be a file name: {error}") from error
    if target.is_symlink():
        raise DestinationError(f"{target} is a symbolic link; TDC does not write through links")
    if target.is_dir():
        raise DestinationError(f"{target} is a folder, not a file")
    if not target.parent.is_dir():
        raise DestinationError(f"the folder {target.parent} does not exist")
    return target


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write beside ``path``, flush to disk, then rename: the name never holds half a file.

    Raises DestinationError; the temporary file is removed and what was at ``path`` stays.
    """
    target = checked_destination(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.tdc-", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise DestinationError(f"{target} cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
