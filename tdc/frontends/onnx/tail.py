"""What belongs to a use beside its product: padding before it, a constant addition and a normalisation behind it.

``y = s (a W x + c - mean) + beta`` with ``s = gamma / sqrt(var + eps)``: the canonical weight of a use with a
normalisation is ``diag(s) W``, its bias ``s (c - mean) + beta``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .constants import known
from .operators import Form

__all__ = ["NO_TAIL", "Tail", "bias", "gain", "is_void", "padding_axes", "padding_before", "scales", "slot", "tail"]

_CLASSES = "pkg.torch.onnx.class_hierarchy"
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, eq=False, slots=True)
class Tail:
    """Constant operators behind a use: an addition ``add`` of its input ``operand``, then a normalisation ``norm``."""

    add: ir.Node | None = None
    operand: int = 0
    norm: ir.Node | None = None

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return tuple(node for node in (self.add, self.norm) if node is not None)


NO_TAIL = Tail()


def tail(node: ir.Node, form: Form, width: int, rank: Callable[[ir.Value], int | None]) -> Tail:
    """The constant operators behind ``node`` that act on its ``width`` outputs and nobody else reads the input of.

    ``rank`` tells that of a value, where it is known.
    """
    if not form.kind.is_conv and not form.output_last:
        return NO_TAIL
    value, add, operand = node.outputs[0], None, 0
    reader = _only_reader(value)
    if reader is not None and reader.op_type == "Add" and reader.domain == "":
        operand = 1 if reader.inputs[0] is value else 0
        if _vector(reader.inputs[operand], form, width) is not None:
            add, value = reader, reader.outputs[0]
            reader = _only_reader(value)
    norm = reader if reader is not None and _folds(reader, value, node, form, width, rank) else None
    return Tail(add, operand, norm)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, producer = uses[0].node, value.producer()
    return reader if producer is not None and reader.graph is producer.graph else None


def _vector(value: ir.Value | None, form: Form, width: int) -> np.ndarray | None:
    """A constant with one entry per output, as the float64 vector that it is; None for anything else."""
    entries = known(value)
    if entries is None or entries.size != width or entries.ndim == 0:
        return None
    place = entries.ndim - 1 - len(form.windows)
    if place < 0 or entries.shape[place] != width or (form.kind.is_conv and place > 1):
        return None
    return entries.astype(np.float64).reshape(-1)


def _folds(
    node: ir.Node,
    value: ir.Value,
    product: ir.Node,
    form: Form,
    width: int,
    rank: Callable[[ir.Value], int | None],
) -> bool:
    """Whether ``node`` is a normalisation by constants over the axis of the outputs."""
    if node.op_type != "BatchNormalization" or node.domain != "" or node.inputs[0] is not value:
        return False
    if not form.kind.is_conv and rank(value) != 2:
        return False
    if node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1):
        return False
    if any(output.name for output in node.outputs[1:]):  # what training mode was written as before opset 14
        return False
    if product.op_type in ("Gemm", "Conv") and _has_bias(product) and _own_bias(product, form, width) is None:
        return False
    parameters = [known(entry) for entry in node.inputs[1:5]]
    if any(entries is None or entries.shape != (width,) for entries in parameters):
        return False
    return bool(np.isfinite(_norm(node)).all())


def _norm(node: ir.Node) -> np.ndarray:
    """(2, outputs): factor and summand of a normalisation, float64.

    The factor is worked out in float32 (float64 for float64), as exporters do it when they fold, so that a folded file
    and one that is not hold the same weight to the last bit.
    """
    arrays = [np.asarray(known(value)) for value in node.inputs[1:5]]
    exact = np.float64 if arrays[3].dtype == np.float64 else np.float32
    gamma, beta, mean, variance = (array.astype(exact) for array in arrays)
    epsilon = np.full_like(variance, node.attributes.get_float("epsilon", 1e-5))
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(np.add(variance, epsilon))
        wide = factor.astype(np.float64)
        return np.stack([wide, beta.astype(np.float64) - mean.astype(np.float64) * wide])


def gain(behind: Tail) -> np.ndarray | None:
    """``s``, one float64 number per output, where there is a normalisation."""
    return None if behind.norm is None else _norm(behind.norm)[0]


def scales(node: ir.Node) -> tuple[float, float]:
    """(alpha, beta) of a Gemm, 1 for all others."""
    if node.op_type != "Gemm":
        return 1.0, 1.0
    return node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _own_bias(node: ir.Node, form: Form, width: int) -> np.ndarray | None:
    """The third input of a Gemm or Conv, times beta, if it is a constant vector over the outputs."""
    if not _has_bias(node) or (node.op_type == "Gemm" and not form.output_last):
        return None
    entries = known(node.inputs[2])
    if node.op_type == "Conv":
        return None if entries is None or entries.size != width else entries.astype(np.float64).reshape(-1)
    vector = _vector(node.inputs[2], form, width)
    return None if vector is None else scales(node)[1] * vector


def bias(node: ir.Node, form: Form, behind: Tail, width: int) -> np.ndarray | None:
    """The bias of a use, one float64 number per output, with a normalisation folded in; None if it has none that can
    be changed.
    """
    own = _own_bias(node, form, width)
    added = None if behind.add is None else _vector(behind.add.inputs[behind.operand], form, width)
    if behind.norm is None:
        place = slot(node, form, behind, width)
        return None if place is None else own if place[0] is node else added
    total = sum((part for part in (own, added) if part is not None), np.zeros(width))
    factor, summand = _norm(behind.norm)
    return factor * total + summand


def slot(node: ir.Node, form: Form, behind: Tail, width: int) -> tuple[ir.Node, int] | None:
    """Node and input that hold the bias of a use, if it can be changed and no normalisation is folded into it."""
    own = _own_bias(node, form, width)
    if behind.norm is not None or (own is None and _has_bias(node)):
        return None
    if own is not None and not is_void(node):
        return node, 2
    return None if behind.add is None else (behind.add, behind.operand)


def is_void(node: ir.Node) -> bool:
    """Whether a Conv's bias is one of zeros that is computed, not stored: what exporters write for none at all."""
    value = node.inputs[2] if node.op_type == "Conv" and _has_bias(node) else None
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Expand":
        return False
    entries = known(value)
    return entries is not None and not entries.any()


def padding_axes(node: ir.Node, rank: int) -> dict[int, tuple[int, int]] | None:
    """Axis -> (before, after) of a Pad node with constant pads; None if they are not known."""
    if len(node.inputs) > 1:
        pads = known(node.inputs[1])
        axes = known(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(rank)
    else:
        pads, axes = np.array(node.attributes.get_ints("pads", ())), np.arange(rank)
    if pads is None or axes is None or pads.size != 2 * axes.size:
        return None
    count = axes.size
    return {int(axis) % rank: (int(pads[k]), int(pads[k + count])) for k, axis in enumerate(axes.reshape(-1))}


def padding_before(node: ir.Node, form: Form) -> tuple[ir.Node, tuple[tuple[int, int], ...]] | None:
    """A Pad node that belongs to a convolution, with its zeros along each window axis.

    torch's exporter writes ``padding="same"`` of even windows so; its notes say that both come from one module. Other
    Pad nodes are layers of their own.
    """
    value = node.inputs[0]
    pad = value.producer() if value is not None else None
    if pad is None or pad.op_type != "Pad" or pad.domain != "" or any(window.auto for window in form.windows):
        return None
    scopes, classes = (node.metadata_props.get(key, "").split(", ") for key in (_SCOPES, _CLASSES))
    together = scopes[:-1] == pad.metadata_props.get(_SCOPES, "").split(", ")[:-1]
    fill = known(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(1)
    if len(classes) < 2 or ".Conv" not in classes[-2] or not together or fill is None or fill.any():
        return None
    if pad.attributes.get_string("mode", "constant") != "constant" or pad.attributes.get_float("value", 0.0) != 0.0:
        return None
    zeros = padding_axes(pad, len(form.windows) + 2)
    if zeros is None or any(zeros.get(axis, (0, 0)) != (0, 0) for axis in (0, 1)):
        return None
    sides = tuple(zeros.get(axis + 2, (0, 0)) for axis in range(len(form.windows)))
    return None if min(min(pair) for pair in sides) < 0 else (pad, sides)
