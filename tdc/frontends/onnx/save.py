"""Write a model under its name: complete and checked, or not at all.

Everything is written beside the destination under a temporary name, flushed to the disk, read back by the checker and
by onnxruntime, and only then moved into place. The weights of large models go to a second file whose name holds the
hash of its content, so that the move of the model file is the one moment at which the result changes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from ...errors import DestinationError, VerificationError
from .load import EXTERNAL
from .runtime import first_line, inline_attributes, ort_errors, session_options
from .tensors import graphs

__all__ = ["save_model"]

INLINE_LIMIT = 1_800_000_000
"""Bytes of tensors above which they go to a file of their own: protobuf ends at 2 GB."""
_EXTERNAL_FROM = 1024
_ALIGNMENT = 4096
_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}


def save_model(
    model: ir.Model,
    destination: str | os.PathLike[str],
    *,
    source: Path | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write ``model`` with ``metadata`` added to its properties. The model itself is not changed.

    Raises DestinationError if the file cannot or must not be written, VerificationError if what was written is refused
    by the checker or by onnxruntime; then nothing is left behind and an older file of that name is as it was.
    """
    destination = Path(destination)
    _check_destination(model, destination, source)
    copy = model.clone()
    copy.metadata_props.update(metadata or {})
    tensors = [tensor for _, tensor in _initializers(copy)]
    external = any(isinstance(t, ir.ExternalTensor) for t in tensors) or sum(t.nbytes for t in tensors) > INLINE_LIMIT
    for graph, _ in graphs(copy):
        inline_attributes(graph)
    with _Workplace(destination) as place:
        try:
            if external:
                _write_tensors(copy, place)
            temporary = place.temporary()
            data = _serialise(copy)
            with place.writing(temporary) as file:
                file.write(data)
            del data
            _verify(copy, temporary)
            place.commit(temporary)
        except OSError as error:
            if isinstance(error, DestinationError):
                raise
            raise DestinationError(f"{destination} cannot be written: {error.strerror or error}") from error


def _check_destination(model: ir.Model, destination: Path, source: Path | None) -> None:
    """Refuse what must not be overwritten. A link at the destination is replaced, never followed."""
    folder = destination.parent
    try:
        if not folder.is_dir():
            raise DestinationError(f"{destination} cannot be written: there is no folder {folder}")
        if not destination.name or destination.name == "..":
            raise DestinationError(f"{destination} is not the name of a file")
        if not os.path.lexists(destination):
            return
        kind = destination.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            what = "a directory" if stat.S_ISDIR(kind) else "not a regular file"
            raise DestinationError(f"{destination} cannot be written: it is {what}")
        if not destination.exists():
            return
        used = [Path(t.path) for _, t in _initializers(model) if isinstance(t, ir.ExternalTensor)]
        used += model.graph.meta.get(EXTERNAL, ())  # those of replaced weights too
        for path in dict.fromkeys([*([source] if source is not None else []), *used]):
            if path.exists() and destination.samefile(path):
                raise DestinationError(f"{destination} is {path}, from which the model is read: choose another name")
    except (OSError, ValueError) as error:
        if isinstance(error, DestinationError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DestinationError(f"{destination} cannot be written: {reason}") from error


def _initializers(model: ir.Model) -> Iterator[tuple[ir.Value, Any]]:
    for graph, _ in graphs(model):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            if value.const_value is not None:
                yield value, value.const_value


def _serialise(model: ir.Model) -> bytes:
    try:
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise VerificationError(f"the new model cannot be stored: {first_line(error)}") from error
    return data


@dataclass
class _Workplace:
    """The temporary files beside one destination; those still there at the end are removed."""

    destination: Path
    made: list[Path] = field(default_factory=list)

    def __enter__(self) -> _Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.made:
            path.unlink(missing_ok=True)

    def temporary(self) -> Path:
        """A new name in the folder of the destination."""
        return self.destination.with_name(f".{self.destination.name[:80]}.{os.getpid()}-{secrets.token_hex(6)}.tmp")

    @contextmanager
    def writing(self, path: Path) -> Iterator[Any]:
        """A new file, on the disk when the block ends."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.made.append(path)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def settle(self, temporary: Path, path: Path) -> None:
        """Give a complete file its name; removed again on failure, unless it was there before."""
        existed = os.path.lexists(path)
        os.replace(temporary, path)
        self.made.remove(temporary)
        if not existed:
            self.made.append(path)

    def commit(self, temporary: Path) -> None:
        """Move the model to its name: from here on everything stays."""
        os.replace(temporary, self.destination)
        self.made.clear()
        with suppress(OSError):  # the file is complete and in place; some file systems cannot flush a folder
            descriptor = os.open(self.destination.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _write_tensors(model: ir.Model, place: _Workplace) -> None:
    """Move the initializers of ``model`` to a data file that is named after its content."""
    temporary = place.temporary()
    digest = hashlib.sha256()
    moved: list[tuple[ir.Value, Any, int]] = []
    offset = 0
    with place.writing(temporary) as file:
        for value, tensor in _initializers(model):
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes < _EXTERNAL_FROM:
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
                continue
            padding = bytes(-offset % _ALIGNMENT)
            data = tensor.tobytes()
            for part in (padding, data):
                file.write(part)
                digest.update(part)
            offset += len(padding)
            moved.append((value, tensor, offset))
            offset += len(data)
    path = place.destination.with_name(f"{place.destination.stem}-{digest.hexdigest()[:12]}.data")
    if path.exists() and not path.is_file():
        raise DestinationError(f"{path} cannot be written: it is not a file")
    place.settle(temporary, path)
    for value, tensor, start in moved:
        value.const_value = ir.ExternalTensor(
            path.name,
            start,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or value.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )


def _verify(model: ir.Model, path: Path) -> None:
    """The checker and onnxruntime must take the file as it lies on the disk."""
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise VerificationError(f"the new model is not valid: {first_line(error)}") from error
    used = {node.domain for graph, _ in graphs(model) for node in graph}
    if not used <= _KNOWN_DOMAINS | {function.domain for function in model.functions.values()}:
        return  # operators of somebody else's: onnxruntime cannot judge them
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except NoKernel:
        return  # a valid operator and type (such as bfloat16) for which the processor has no kernel
    except ort_errors() as error:
        raise VerificationError(f"onnxruntime refuses the new model: {first_line(error)}") from error
