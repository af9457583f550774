"""Calibration data in any of its usual forms, checked against the inputs of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import CalibrationError

__all__ = ["Batch", "read_batches"]

Batch = dict[str, Any]

_FORMS = (
    "an iterable of {input name: array}, or of tuples in the order of the inputs; a DataLoader; "
    "an object with get_next(); or one {input name: array}"
)


def read_batches(calibration: Any, inputs: Sequence[ir.Value]) -> Iterator[Batch]:
    """Batches as onnxruntime takes them. ``inputs`` are those of the graph; one with a default value may be left out.

    Entries of a tuple beyond the inputs are dropped, so the labels of a data loader do no harm. Raises CalibrationError
    for data of a wrong type at once, and for a batch that does not fit when it comes.
    """
    items = _items(calibration)
    return _checked(items, inputs)


def _items(calibration: Any) -> Iterable[Any]:
    if isinstance(calibration, Mapping):
        return [calibration]
    get_next = getattr(calibration, "get_next", None)
    if callable(get_next):
        return _reader(get_next)
    if isinstance(calibration, str | bytes | np.ndarray | torch.Tensor) or not hasattr(calibration, "__iter__"):
        raise CalibrationError(f"calibration data of type {type(calibration).__name__} cannot be read: give {_FORMS}")
    return calibration


def _reader(get_next: Callable[[], Any]) -> Iterator[Any]:
    while (item := get_next()) is not None:
        yield item


def _checked(items: Iterable[Any], inputs: Sequence[ir.Value]) -> Iterator[Batch]:
    count = 0
    for item in items:
        yield _batch(item, inputs, count)
        count += 1
    if not count:
        raise CalibrationError("the calibration data is empty: no batch came out of it")


def _batch(item: Any, inputs: Sequence[ir.Value], count: int) -> Batch:
    required = [value for value in inputs if value.const_value is None]
    known = [value.name or "" for value in inputs]
    if isinstance(item, np.ndarray | torch.Tensor) and len(required) == 1:
        item = (item,)
    if isinstance(item, tuple | list):
        if len(item) < len(required):
            wanted = ", ".join(value.name or "" for value in required)
            raise CalibrationError(f"batch {count} has {len(item)} values for the {len(required)} inputs {wanted}")
        item = {value.name: entry for value, entry in zip(required, item, strict=False)}
    if not isinstance(item, Mapping):
        raise CalibrationError(f"batch {count} is of type {type(item).__name__}: give {_FORMS}")
    unknown = [str(name) for name in item if name not in known]
    if unknown:
        raise CalibrationError(f"batch {count} has the unknown inputs {unknown}; the model has {known}")
    missing = [value.name for value in required if value.name not in item]
    if missing:
        raise CalibrationError(f"batch {count} lacks the inputs {missing}; it has {sorted(map(str, item))}")
    return {value.name or "": _entry(item[value.name], value) for value in inputs if value.name in item}


def _entry(given: Any, value: ir.Value) -> Any:
    """One input as an array of the graph's type, rank and fixed sizes."""
    if not isinstance(value.type, ir.TensorType):
        return given
    name, dtype = value.name, value.type.dtype
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given
    try:
        entries = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(f"input {name!r} cannot be made an array: {error}") from error
    _check_shape(entries.shape, value)
    if dtype == ir.DataType.STRING or dtype == ir.DataType.BFLOAT16:
        return entries
    return np.ascontiguousarray(_cast(entries, dtype.numpy(), name or ""))


def _check_shape(shape: tuple[int, ...], value: ir.Value) -> None:
    if value.shape is None:
        return
    wanted = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    fits = len(shape) == len(wanted)
    fits = fits and all(not isinstance(dim, int) or dim == size for dim, size in zip(wanted, shape, strict=True))
    if not fits:
        raise CalibrationError(f"input {value.name!r} has shape {list(shape)}; the model wants {wanted}")


def _cast(entries: np.ndarray, wanted: np.dtype[Any], name: str) -> np.ndarray:
    """Another precision of the same kind of number, or an error: no value may change its meaning."""
    if entries.dtype == wanted:
        return entries
    fail = CalibrationError(f"input {name!r} has dtype {entries.dtype.name}; the model wants {wanted.name}")
    if entries.dtype.kind not in "fiub" or (entries.dtype.kind == "f" and wanted.kind != "f"):
        raise fail
    with np.errstate(all="ignore"):
        cast = entries.astype(wanted)
        back = cast.astype(entries.dtype)
    if entries.dtype.kind == "f":
        same = np.isfinite(cast) == np.isfinite(entries)
    else:
        same = back == entries
        if {wanted.kind, entries.dtype.kind} == {"u", "i"}:
            same &= (entries >= 0) & (cast >= 0)
    if not bool(np.all(same)):
        raise CalibrationError(f"{fail}, and some of its entries do not fit into that")
    return cast
