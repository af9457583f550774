"""Shapes of values: what the file says, what can be inferred, and what a run shows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from ...errors import ModelError
from .names import unique_name
from .runtime import Session, ort_errors

__all__ = ["Known", "Shapes", "inferred", "measured"]

Known = dict[str, tuple[int | None, ...]]
"""Shape by name of value; None for a size that is not known."""


class Shapes:
    """What is known of a model as it is, inferred once when first needed."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._inferred: Known | None = None

    def of(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """The shape of a value, as far as it is known."""
        if value.shape is not None:
            return _plain(value.shape)
        if self._inferred is None:
            self._inferred = inferred(self.model)
        return self._inferred.get(value.name or "")

    def rank(self, value: ir.Value) -> int | None:
        shape = self.of(value)
        return None if shape is None else len(shape)


def inferred(model: ir.Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> Known:
    """Shapes of all values of the main graph, with these ``inputs`` if given."""
    from onnx_ir.passes.common import ShapeInferencePass

    copy = model.clone()
    if inputs is not None:
        for value in copy.graph.inputs:
            value.shape = ir.Shape(inputs[value.name or ""]) if value.name in inputs else value.shape
        for value in (*copy.graph.outputs, *(value for node in copy.graph for value in node.outputs)):
            if value.shape is not None and None in _plain(value.shape):
                value.shape = None
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=inputs is not None)
    with _quiet():
        infer(copy)
    values = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
    return {value.name or "": _plain(value.shape) for value in values if value.shape is not None}


@contextmanager
def _quiet() -> Iterator[None]:
    """No word from onnx_ir where inference fails: then shapes are not known, and that is all."""
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def measured(model: ir.Model, batch: Mapping[str, Any], names: Sequence[str]) -> Known:
    """Shapes of some values of the main graph in a run on the batch; none of them if the model does not run."""
    copy = model.clone()
    values = {value.name or "": value for node in copy.graph for value in node.outputs}
    taken = set(values) | set(copy.graph.initializers) | {value.name or "" for value in copy.graph.inputs}
    nodes = [ir.node("Shape", [values[name]]) for name in names]
    for node in nodes:
        node.outputs[0].name = unique_name("tdc.shape", taken)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    copy.graph.extend(nodes)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(node.outputs[0] for node in nodes)
    try:
        shapes = Session(copy).run([node.outputs[0].name or "" for node in nodes], batch)
    except ModelError:
        return {}
    except ort_errors():
        return {}
    return {name: tuple(int(size) for size in shape) for name, shape in zip(names, shapes, strict=True)}


def _plain(shape: ir.Shape) -> tuple[int | None, ...]:
    return tuple(dim if isinstance(dim, int) else None for dim in shape)
