"""onnxruntime sessions on models that live in memory, above 2 GB too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import ModelError
from .names import unique_name
from .tensors import array, graphs

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Session", "first_line", "free_names", "inline_attributes", "ort_errors", "session_options"]

_INLINE_BYTES = 1024
_IN_MEMORY = "in-memory"


def ort_errors() -> tuple[type[Exception], ...]:
    """Everything onnxruntime raises for a model or for data that it does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def session_options() -> onnxruntime.SessionOptions:
    """As many threads as torch has, and no messages of its own: what goes wrong is raised."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from torch, which works between the runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return options


class Session:
    """A model ready to run. Takes over ``model`` (a clone): large initializers are lent to onnxruntime, not copied."""

    def __init__(self, model: ir.Model) -> None:
        import onnxruntime

        free_names(model)
        options = session_options()
        self._kept = _lend_initializers(model, options)
        data = ir.to_proto(model).SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except ort_errors() as error:
            raise ModelError(f"onnxruntime does not run the model: {first_line(error)}") from error

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run once. Raises what onnxruntime raises."""
        return self._session.run(list(outputs), dict(feeds))


def _lend_initializers(model: ir.Model, options: onnxruntime.SessionOptions) -> list[Any]:
    """Mark large initializers as stored elsewhere, and give their memory to the session; all others go inline."""
    import onnxruntime

    names, lent = [], []
    for graph, where in graphs(model):
        inline_attributes(graph)
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            tensor = value.const_value
            if tensor is None:
                continue
            big = tensor.nbytes > _INLINE_BYTES and not where and not value.is_graph_input() and value.uses()
            if big and _plain(tensor.dtype):
                names.append(value.name)
                lent.append(_ort_value(onnxruntime, tensor))
                shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
                value.const_value = ir.ExternalTensor(
                    _IN_MEMORY, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
                )
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = _in_memory(tensor)
    if names:
        options.add_external_initializers(names, lent)
    return lent


def _plain(dtype: ir.DataType) -> bool:
    return dtype == ir.DataType.BFLOAT16 or (dtype != ir.DataType.STRING and dtype.numpy().kind in "fiub")


def _ort_value(onnxruntime: Any, tensor: ir.TensorProtocol) -> Any:
    values = np.ascontiguousarray(array(tensor))
    if tensor.dtype == ir.DataType.BFLOAT16:
        raw = values.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(tensor.dtype))
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def _in_memory(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(array(tensor), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def inline_attributes(graph: ir.Graph | ir.Function) -> None:
    """Read tensors of attributes that are stored in external files into memory."""
    for node in graph:
        for key, attribute in list(node.attributes.items()):
            if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[key] = ir.AttrTensor(key, _in_memory(attribute.value))


def free_names(model: ir.Model) -> None:
    """Make node names unique within each graph: the checker lets repeated ones through, onnxruntime does not."""
    for graph, _ in graphs(model):
        taken: set[str] = {node.name for node in graph if node.name}
        seen: set[str] = set()
        for node in _repeated(graph, seen):
            node.name = unique_name(node.name or "", taken)


def _repeated(graph: Iterable[ir.Node], seen: set[str]) -> list[ir.Node]:
    repeated = []
    for node in graph:
        if node.name and node.name in seen:
            repeated.append(node)
        seen.add(node.name or "")
    return repeated
