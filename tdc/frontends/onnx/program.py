"""An ONNX model as the passes see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import CalibrationError, PlanError, VerificationError
from ...ir import Cost, Remark, Site
from ..program import Replacement, Tap
from .calibration import Batch, read_batches
from .emit import Emitter, check_block
from .fold import consumers, regions
from .load import REMARKS
from .match import Match, Use, find_sites
from .names import unique_name
from .runtime import Session, first_line, free_names, ort_errors
from .tensors import array, constant_tensor, graphs, stored, to_numpy, to_torch

__all__ = ["OnnxProgram"]


@dataclass(frozen=True)
class _Fed:
    """A weight as an input of the running model: its site, its orientation, and what is fed by default."""

    order: int
    stored_oi: bool
    name: str
    dense: np.ndarray
    dtype: ir.DataType


class OnnxProgram:
    """A loaded model, implementing :class:`tdc.frontends.program.Program`. The model itself is never changed."""

    door = "onnx"

    def __init__(self, model: ir.Model, source: Path | None = None) -> None:
        self.model, self.source = model, source
        self._found: tuple[tuple[Match, ...], tuple[Remark, ...]] | None = None
        self._replacements: dict[int, Replacement] = {}
        self._tapped: dict[tuple[int, ...], tuple[Session, tuple[str, ...]]] = {}
        self._open: tuple[Session, tuple[_Fed, ...]] | None = None

    @property
    def _matches(self) -> tuple[Match, ...]:
        if self._found is None:
            matches, remarks = find_sites(self.model)
            readers = consumers(matches)
            matches = tuple(
                replace(match, site=replace(match.site, pointwise_consumer=readers.get(k)))
                for k, match in enumerate(matches)
            )
            self._found = matches, remarks
        return self._found[0]

    def _match(self, order: int) -> Match:
        if not 0 <= order < len(self._matches):
            raise PlanError(f"the model has {len(self._matches)} sites; there is none of order {order}")
        return self._matches[order]

    def sites(self) -> tuple[tuple[Site, ...], tuple[Remark, ...]]:
        """All sites in topological order, and why other weights were passed over."""
        matches = self._matches
        assert self._found is not None
        remarks = (*self.model.graph.meta.get(REMARKS, ()), *self._found[1])
        return tuple(match.site for match in matches), remarks

    def weight(self, site: Site) -> Tensor:
        """The canonical weight (o, i), contiguous, in its own dtype, with the bits of the file."""
        return self._match(site.order).weight()

    def batches(self, calibration: Any) -> Iterator[Batch]:
        """Calibration data as ``{input name: array}``, checked against the graph's inputs."""
        return read_batches(calibration, self.model.graph.inputs)

    def observe(self, batch: Batch, sites: Iterable[Site], tap: Tap) -> None:
        """Run the dense model and hand over what enters every use of the sites, input axis last."""
        sites = tuple(sites)
        session, names = self._tapped_session(tuple(site.order for site in sites))
        values = dict(zip(names, self._run(session, names, batch), strict=True))
        shown: dict[tuple[str, bool], Tensor] = {}
        for site in sites:
            for use in self._match(site.order).uses:
                key = (use.activation.name or "", use.linear.input_last)
                if key not in shown:
                    shown[key] = self._activation(use, values, batch)
                tap(site, shown[key])

    def _activation(self, use: Use, values: Mapping[str, Any], batch: Batch) -> Tensor:
        value = use.activation
        name = value.name or ""
        if name in values:
            entries = values[name]
        elif name in batch:
            entries = batch[name]
        else:
            assert value.const_value is not None
            entries = array(value.const_value)
        tensor = to_torch(entries)
        return tensor if use.linear.input_last else tensor.swapaxes(-1, -2)

    def outputs(self, batch: Batch, weights: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Floating outputs by name, with ``weights`` (canonical, by site order) in place of the stored ones."""
        if self._open is None:
            model, fed = self._with_weight_inputs()
            self._open = (Session(model), fed)
        session, fed = self._open
        feeds: dict[str, Any] = dict(batch)
        for entry in fed:
            new = weights.get(entry.order)
            feeds[entry.name] = entry.dense if new is None else to_numpy(new if entry.stored_oi else new.T, entry.dtype)
        names = [value.name or "" for value in self.model.graph.outputs]
        values = self._run(session, names, feeds)
        floating = (isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in values)
        return {name: to_torch(value) for name, value, keep in zip(names, values, floating, strict=True) if keep}

    def _run(self, session: Session, names: Iterable[str], feeds: Batch) -> list[Any]:
        try:
            return session.run(tuple(names), feeds)
        except ort_errors() as error:
            raise CalibrationError(f"the model does not run on this batch: {first_line(error)}") from error

    def _tapped_session(self, orders: tuple[int, ...]) -> tuple[Session, tuple[str, ...]]:
        """The dense model with the values that enter the sites as its outputs; its own outputs if there are none."""
        if orders not in self._tapped:
            copy, values = self._clone()
            uses = [use for order in orders for use in self._match(order).uses]
            taps: dict[ir.Value, None] = {}
            for use in uses:
                value = values[use.activation]
                if value.producer() is not None:
                    value.type = value.type or ir.TensorType(_tensor(use.root).dtype)
                    taps[value] = None
            outputs = list(taps) or list(copy.graph.outputs)
            copy.graph.outputs.clear()
            copy.graph.outputs.extend(outputs)
            names = tuple(value.name or "" for value in outputs)
            self._tapped[orders] = (Session(copy), names)
        return self._tapped[orders]

    def _with_weight_inputs(self) -> tuple[ir.Model, tuple[_Fed, ...]]:
        """The dense model with the weights of all sites as inputs, in the orientation that each operator reads.

        The Transpose nodes on the way are left out: onnxruntime 1.32 gives wrong numbers where it fuses one with the
        product of a matrix and a vector, which it does for weights that are not constant.
        """
        copy, values = self._clone()
        nodes = dict(zip(self.model.graph, copy.graph, strict=True))
        names = Emitter(copy).values
        fed: dict[tuple[int, bool], tuple[_Fed, ir.Value]] = {}
        for order, match in enumerate(self._matches):
            for use in match.uses:
                key = (order, use.linear.stored_oi)
                if key not in fed:
                    fed[key] = _weight_input(use, order, unique_name(f"tdc.weight.{order}", names))
                    copy.graph.inputs.append(fed[key][1])
                nodes[use.node].replace_input_with(1 - use.linear.data, fed[key][1])
        emitter = Emitter(copy)
        for use in (use for match in self._matches for use in match.uses):
            emitter.sweep(_moved(use, nodes, values))
        return copy, tuple(entry for entry, _ in fed.values())

    def _clone(self) -> tuple[ir.Model, dict[ir.Value, ir.Value]]:
        """A copy of the model that shares its tensors, and which value of it stands for which of the main graph."""
        copy = self.model.clone()
        values: dict[ir.Value, ir.Value] = dict(zip(self.model.graph.inputs, copy.graph.inputs, strict=True))
        values.update((old, copy.graph.initializers[name]) for name, old in self.model.graph.initializers.items())
        for old, new in zip(self.model.graph, copy.graph, strict=True):
            values.update(zip(old.outputs, new.outputs, strict=True))
        return copy, values

    def cost(self) -> Cost:
        """Floating parameters, and bytes of all tensors of the file, each stored one once."""
        seen: set[object] = set()
        params = size = 0
        for tensor in self._stored():
            external = isinstance(tensor, ir.ExternalTensor)
            key: object = (str(tensor.path), tensor.offset) if external else id(tensor)
            if tensor.dtype == ir.DataType.STRING or key in seen:
                continue
            seen.add(key)
            params += tensor.size if tensor.dtype.is_floating_point() else 0
            size += tensor.nbytes
        return Cost(params, size, 0)

    def _stored(self) -> Iterator[Any]:
        for graph, _ in graphs(self.model):
            if isinstance(graph, ir.Graph):
                yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
            yield from (tensor for node in graph if (tensor := constant_tensor(node)) is not None)

    def replace(self, site: Site, new: Replacement) -> None:
        """Note a replacement; the file does not record the name of its decomposition.

        Raises VerificationError if the block cannot be written, or the factors do not fit it.
        """
        match = self._match(site.order)
        check_block(new.block)
        for name, shape in new.block.factors:
            factor = new.factors.get(name)
            if factor is None or tuple(factor.shape) != shape:
                given = "none" if factor is None else list(factor.shape)
                raise VerificationError(f"{site.name}: factor {name!r} has shape {given}, not {list(shape)}")
            dtype = str(factor.dtype).removeprefix("torch.")
            if factor.is_floating_point() and dtype != match.site.dtype:
                raise VerificationError(f"{site.name}: factor {name!r} has dtype {dtype}, not {match.site.dtype}")
        self._replacements[site.order] = new

    def finish(self) -> ir.Model:
        """A new model with all noted replacements; everything else is as it was."""
        copy, values = self._clone()
        free_names(copy)
        nodes = dict(zip(self.model.graph, copy.graph, strict=True))
        emitter = Emitter(copy)
        behind = regions(self._matches)
        for order, new in sorted(self._replacements.items()):
            match = self._matches[order]
            if new.output_order is not None:
                vectors = [(nodes[node], operand) for node, operand in behind[order].vectors]
                emitter.reorder(vectors, new.output_order.numpy())
            uses = tuple(_moved(use, nodes, values) for use in match.uses)
            emitter.replace(uses, new.block, new.factors, match.site.name)
        return copy


def _moved(use: Use, nodes: Mapping[ir.Node, ir.Node], values: Mapping[ir.Value, ir.Value]) -> Use:
    """The same use in a copy of the model."""
    chain = tuple(nodes[node] for node in use.chain)
    return replace(use, node=nodes[use.node], root=values[use.root], chain=chain)


def _weight_input(use: Use, order: int, name: str) -> tuple[_Fed, ir.Value]:
    """An input for the weight as ``use`` reads it; dense entries are copied only if stored transposed."""
    tensor = _tensor(use.root)
    dense = array(tensor)
    turned = use.flipped == use.linear.stored_oi
    dense = np.ascontiguousarray(dense.T) if turned else dense
    fed = _Fed(order, use.linear.stored_oi, name, dense, tensor.dtype)
    return fed, ir.Value(name=name, shape=ir.Shape(dense.shape), type=ir.TensorType(tensor.dtype))


def _tensor(root: ir.Value) -> ir.TensorProtocol:
    """The stored tensor of a weight."""
    tensor = stored(root)
    assert tensor is not None
    return tensor
