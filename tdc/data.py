"""Calibration data from files, for the command line."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import CalibrationError

__all__ = ["NpzBatches"]


class NpzBatches:
    """Batches from ``.npz`` files: a folder of them, one batch each in the order of their names, or one file.

    The arrays of a file are named as the model's inputs. A single file is cut along the leading axis into batches of
    ``batch`` examples. Pickled arrays are refused. Can be iterated again.
    """

    def __init__(self, path: str | Path, batch: int = 16) -> None:
        self.path, self.batch = Path(path), batch
        if not self.path.exists():
            raise CalibrationError(f"there is no calibration data {path}")
        if batch < 1:
            raise CalibrationError(f"the batch size must be at least 1; got {batch}")
        self.files = sorted(self.path.glob("*.npz")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise CalibrationError(f"the folder {path} holds no .npz file")

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self.files:
            arrays = _read(file)
            if self.path.is_dir():
                yield arrays
                continue
            lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                raise CalibrationError(
                    f"the arrays of {file} must have one leading axis in common; lengths are {lengths}"
                )
            for start in range(0, next(iter(lengths.values())), self.batch):
                yield {name: array[start : start + self.batch] for name, array in arrays.items()}


def _read(file: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(file):
        raise CalibrationError(f"{file} cannot be read as an .npz file: it is not what numpy.savez writes, or cut off")
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except Exception as error:  # numpy, zipfile, zlib and the reader of headers each raise their own for damaged files
        raise CalibrationError(f"{file} cannot be read as an .npz file: {error}") from error
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise CalibrationError(f"{file} holds no arrays, or something else beside them")
    return arrays
