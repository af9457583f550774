"""Read and validate an ONNX file that nobody vouches for.

Neither the checker of the onnx package nor onnxruntime is a complete gate (each lets through what the other refuses),
so the file passes three: the laws below, the checker, and onnxruntime when the model is first run.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ...errors import ModelError
from ...ir import Remark

__all__ = ["EXTERNAL", "REMARKS", "file_size", "load_model"]

REMARKS = "tdc.remarks"
"""Key under ``model.graph.meta`` of what was noted while reading."""
EXTERNAL = "tdc.external"
"""Key under ``model.graph.meta`` of the external data files that the model was read from."""

_PROTOBUF_LIMIT = (1 << 31) - 1
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_STANDARD = ("", "ai.onnx")
_LAST_IR_WITH_FORCED_INPUTS = 3


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """The model in the file at ``path``; tensors in external files stay there. Raises ModelError if it is not valid."""
    path = Path(path)
    proto = _parse(path)
    _check_versions(path, proto)
    _check_graphs(path, proto)
    _check_with_onnx(path)
    external = _external_files(path, proto)
    remarks = _free_initializers(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {_first_line(error.__cause__ or error)}") from error
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    model.graph.meta[REMARKS] = remarks
    model.graph.meta[EXTERNAL] = external
    return model


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the external data files that it names."""
    path = Path(path)
    return sum(part.stat().st_size for part in (path, *_external_files(path, _parse(path))))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _parse(path: Path) -> onnx.ModelProto:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ModelError(f"{path} is not a file" + (" but a directory" if stat.S_ISDIR(info.st_mode) else ""))
        if info.st_size == 0:
            raise ModelError(f"{path} is empty")
        if info.st_size > _PROTOBUF_LIMIT:
            raise ModelError(f"{path} has {info.st_size} bytes: above 2 GB the weights must be in external data files")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        proto = onnx.ModelProto.FromString(data)
    except (DecodeError, RecursionError, MemoryError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX model, or is cut off or damaged: {_first_line(error)}") from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{path} holds no graph: it is not an ONNX model, or it is cut off")
    return proto


def _check_versions(path: Path, proto: onnx.ModelProto) -> None:
    if proto.ir_version < 1:
        raise ModelError(f"{path} states no IR version: it is not an ONNX model, or it is damaged")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(f"{path} has IR version {proto.ir_version}; this onnx package reads up to {onnx.IR_VERSION}")
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain in _STANDARD else entry.domain
        if domain in versions:
            raise ModelError(f"{path} imports the operator set {domain or 'ai.onnx'!r} twice")
        versions[domain] = entry.version
    if not versions:
        raise ModelError(f"{path} imports no operator set: it is cut off or damaged")
    newest = onnx.defs.onnx_opset_version()
    if "" in versions and not 1 <= versions[""] <= newest:
        raise ModelError(f"{path} uses opset {versions['']}; this onnx package knows 1 to {newest}")
    if proto.training_info:
        raise ModelError(f"{path} holds training information, which TDC does not keep: remove it first")


def _check_with_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} is not a valid model: {_first_line(error)}") from error
    except (RuntimeError, ValueError, TypeError, OSError, RecursionError, DecodeError, UnicodeError) as error:
        raise ModelError(f"{path} cannot be checked: {_first_line(error)}") from error


def _check_graphs(path: Path, proto: onnx.ModelProto) -> None:
    """Tensors of all graphs and functions against the laws that the checker does not enforce."""
    for part in _parts(proto):
        if isinstance(part, onnx.TensorProto):
            _check_tensor(path, part)
            continue
        if part.sparse_initializer:
            raise ModelError(f"{path} has sparse initializers, which TDC cannot keep: store them dense")
        _check_initializers(path, part)


def _parts(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.TensorProto]:
    """All graphs, and the tensors in attributes; those of functions too."""
    todo: list[onnx.GraphProto] = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while todo or nodes:
        if todo:
            graph = todo.pop()
            yield graph
            nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop().attribute:
                yield from (*_own(attribute, "t"), *attribute.tensors)
                todo.extend((*_own(attribute, "g"), *attribute.graphs))


def _external_files(path: Path, proto: onnx.ModelProto) -> tuple[Path, ...]:
    """The external data files that a model names, each once."""
    found: dict[Path, None] = {}
    for part in _parts(proto):
        for tensor in part.initializer if isinstance(part, onnx.GraphProto) else (part,):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                names = (entry.value for entry in tensor.external_data if entry.key == "location")
                found.update((path.absolute().parent / name, None) for name in names)
    return tuple(found)


def _own(attribute: onnx.AttributeProto, field: str) -> Iterator[onnx.TensorProto | onnx.GraphProto]:
    if attribute.HasField(field):
        yield getattr(attribute, field)


def _check_initializers(path: Path, graph: onnx.GraphProto) -> None:
    seen: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise ModelError(f"{path} has an initializer without a name")
        if tensor.name in seen:
            raise ModelError(f"{path} has two initializers named {tensor.name!r}")
        seen.add(tensor.name)
        _check_tensor(path, tensor)


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    where = f"{path}: tensor {tensor.name!r}"
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"{where} has the negative size {min(tensor.dims)}")
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is stored in segments, which no runtime reads")
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise ModelError(f"{where} has the unknown element type {tensor.data_type}") from None
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where} has no element type")
    fields = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    raw = tensor.HasField("raw_data")
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if len(fields) + raw + external > 1:
        kinds = [*fields, *(["raw_data"] if raw else []), *(["external data"] if external else [])]
        raise ModelError(f"{where} is stored twice, as {' and '.join(kinds)}")
    if dtype == ir.DataType.STRING:
        return
    count = prod(tensor.dims)
    needed = (count * dtype.bitwidth + 7) // 8
    if external:
        _check_external(path, where, tensor, needed)
    elif raw and len(tensor.raw_data) != needed:
        shape = list(tensor.dims)
        raise ModelError(f"{where} has {len(tensor.raw_data)} bytes, but its shape {shape} needs {needed}")
    elif not raw:
        _check_typed(where, tensor, dtype, count, fields)


def _check_typed(where: str, tensor: onnx.TensorProto, dtype: ir.DataType, count: int, fields: list[str]) -> None:
    stored = len(getattr(tensor, fields[0])) if fields else 0
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        count *= 2
    least = count if dtype.bitwidth >= 8 else (count * dtype.bitwidth + 7) // 8
    if not least <= stored <= count:
        raise ModelError(f"{where} has {stored} entries, but its shape {list(tensor.dims)} needs {count}")


def _check_external(path: Path, where: str, tensor: onnx.TensorProto, needed: int) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not entries.keys() <= _EXTERNAL_KEYS:
        raise ModelError(f"{where} has unknown or repeated keys for its external data: {sorted(entries)[:8]}")
    size = _external_file(path.absolute().parent, where, entries.get("location", "")).st_size
    numbers = {key: entries.get(key, "") or "0" for key in ("offset", "length")}
    for key, text in numbers.items():
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ModelError(f"{where} has the external {key} {text[:40]!r}, which is not a size in bytes")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if entries.get("length") and length != needed:
        raise ModelError(f"{where} has {length} external bytes, but its shape {list(tensor.dims)} needs {needed}")
    if offset + needed > size:
        raise ModelError(f"{where} ends at byte {offset + needed} of an external file of {size} bytes")


def _external_file(folder: Path, where: str, location: str) -> os.stat_result:
    """Facts of the external file: a regular file of one name, in the folder of the model, reached without links."""
    parts = PurePosixPath(location).parts
    bad = "\0" in location or "\\" in location or location.startswith("/") or re.match(r"[A-Za-z]:", location)
    if not parts or bad or ".." in parts or "_ORT_MEM_ADDR_" in location:
        raise ModelError(f"{where} points to external data outside the folder of the model: {location[:200]!r}")
    current = folder
    try:
        for part in parts:
            current = current / part
            info = current.lstat()
            if stat.S_ISLNK(info.st_mode):
                raise ModelError(f"{where} points to external data through the link {location[:200]!r}")
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{where} has external data in {location[:200]!r}, which cannot be read: {reason}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{where} has external data in {location[:200]!r}, which is not a regular file")
    if info.st_nlink > 1:
        raise ModelError(f"{where} has external data in {location[:200]!r}, a file with {info.st_nlink} hard links")
    return info


def _free_initializers(proto: onnx.ModelProto) -> tuple[Remark, ...]:
    """Before IR version 4 every initializer had to be listed as an input: make constants of them."""
    if proto.ir_version > _LAST_IR_WITH_FORCED_INPUTS:
        return ()
    names = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in names]
    forced = len(proto.graph.input) - len(kept)
    before = proto.ir_version
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.ir_version = _LAST_IR_WITH_FORCED_INPUTS + 1
    reason = f"IR version {before} lists constants as inputs: {forced} of them are constants now, in IR version 4"
    return (Remark("", "find-sites", reason),)
