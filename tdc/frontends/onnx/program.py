"""An ONNX model as the passes see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import CalibrationError, ModelError, PlanError, VerificationError
from ...ir import Block, Cost, Remark, Site
from ..clock import seconds_of
from ..lockstep import Visit, in_step
from ..program import Change, Loss, Replacement, Tap, unpadded_of
from .calibration import Batch, read_batches
from .cost import run_cost
from .emit import Emitter, check_block
from .fold import consumers, regions, units
from .gains import gain_before
from .load import REMARKS
from .match import find_sites
from .operators import EINSUM_OPSET, opset
from .parts import Parts
from .running import Fed, clone, double, moved, with_taps, with_weight_inputs
from .runtime import Session, first_line, free_names, ort_errors
from .tail import scales
from .tensors import constant_tensor, entries_of, graphs, to_torch
from .timing import Met, Stopwatch, example_of, whole
from .uses import Match

__all__ = ["OnnxProgram"]


class OnnxProgram:
    """A loaded model, implementing :class:`tdc.frontends.program.Program`. The model itself is never changed."""

    door = "onnx"

    def __init__(self, model: ir.Model, source: Path | None = None) -> None:
        self.model, self.source = model, source
        self._found: tuple[tuple[Match, ...], tuple[Remark, ...]] | None = None
        self._replacements: dict[int, Replacement] = {}
        self._tapped: dict[tuple[int, ...], tuple[Session, tuple[str, ...]]] = {}
        self._open: tuple[Session, tuple[Fed, ...]] | None = None
        self._seen: Batch | None = None

    @property
    def _matches(self) -> tuple[Match, ...]:
        if self._found is None:
            matches, remarks = find_sites(self.model)
            readers, hidden = consumers(matches), units(matches)
            producers = {k: tuple(sorted(found.producers)) for k, found in hidden.items()}
            matches = tuple(
                replace(
                    m, site=replace(m.site, pointwise_consumer=readers.get(k), hidden_producers=producers.get(k, ()))
                )
                for k, m in enumerate(matches)
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
        """The canonical weight, contiguous, in its own dtype; with the bits of the file if no normalisation is folded
        into it.
        """
        return self._match(site.order).weight()

    def gain(self, site: Site) -> Tensor | None:
        """The gain (i) that a normalisation in front of a linear site multiplies its input with, if there is one."""
        return gain_before(self._match(site.order))

    def batches(self, calibration: Any) -> Iterator[Batch]:
        """Calibration data as ``{input name: array}``, checked against the graph's inputs."""
        return read_batches(calibration, self.model.graph.inputs)

    def unpadded(self, batch: Batch) -> Tensor | None:
        return unpadded_of(batch)

    def observe(self, batch: Batch, sites: Iterable[Site], tap: Tap) -> None:
        """Run the dense model and hand over what enters every use of the sites (of a product: input axis last)."""
        sites = tuple(sites)
        self._seen = self._seen or batch
        session, names = self._tapped_session(tuple(site.order for site in sites))
        values = batch | dict(zip(names, self._run(session, names, batch), strict=True))
        shown: dict[tuple[str, bool], Tensor] = {}
        for site in sites:
            for use in self._match(site.order).uses:
                key = (use.activation.name or "", use.turned)
                if key not in shown:
                    shown[key] = use.oriented(entries_of(use.activation, values))
                tap(site, shown[key])

    def gradients(self, batch: Any, sites: Iterable[Site], loss: Loss, tap: Tap, read: Tap | None = None) -> str:
        return "onnxruntime runs no model backwards"

    def lockstep(self, batches: Sequence[Batch], sites: Iterable[Site], visit: Visit) -> str:
        sites = tuple(sites)
        parts = Parts(self.model, self._matches, sites)
        works = [partial(parts.run, batch, changing) for changing in (False, True) for batch in batches]
        try:
            return in_step(works, sites, visit)
        except ModelError as error:
            return f"onnxruntime does not run the model in parts: {error}"

    def outputs(self, batch: Batch, changes: Mapping[int, Change]) -> dict[str, Tensor]:
        """Floating outputs by name, with ``changes`` (by site order) of the stored weights and biases."""
        if self._open is None:
            model, fed = with_weight_inputs(self.model, self._matches)
            self._open = (Session(model), fed)
        session, fed = self._open
        feeds = {**batch, **{entry.name: entry.value(changes.get(entry.order)) for entry in fed}}
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
        if orders not in self._tapped:
            uses = [use for order in orders for use in self._match(order).uses]
            model, names = with_taps(self.model, uses)
            self._tapped[orders] = (Session(model), names)
        return self._tapped[orders]

    def remembering(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        return nullcontext()

    def cost(self, batch: Batch | None = None) -> Cost:
        """Floating parameters and bytes of all tensors of the file, each stored one once; multiply-adds and peak of the
        activations of a run on the batch, or of any run where the file fixes all sizes (0 where they are not known).
        """
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
        return Cost(params, size, *run_cost(self.model, batch))

    def _stored(self) -> Iterator[Any]:
        for graph, _ in graphs(self.model):
            if isinstance(graph, ir.Graph):
                yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
            yield from (tensor for node in graph if (tensor := constant_tensor(node)) is not None)

    def stopwatch(self, sites: Iterable[Site], batch: Batch | None = None) -> Stopwatch | str:
        """On the first batch that was observed, else on made-up inputs, where the file fixes all sizes."""
        batch, sites = batch or self._example(), tuple(sites)
        if batch is None:
            return "that is measured on calibration data, since the file leaves sizes open, and there are none"
        met: dict[int, list[Met]] = {}
        if sites:  # asked for none, it says that times can be had
            session, names = self._tapped_session(tuple(site.order for site in sites))
            values = batch | dict(zip(names, self._run(session, names, batch), strict=True))
            for site in sites:
                uses = self._match(site.order).uses
                met[site.order] = [Met(use, entries_of(use.activation, values)) for use in uses]
        return Stopwatch(self.model, whole(self.model, batch), sites, met)

    def _example(self) -> Batch | None:
        return self._seen or example_of(self.model.graph.inputs)

    def times(self, result: ir.Model, batch: Batch | None = None) -> tuple[float, float]:
        """Seconds of a run of the model and of one that came of it, called in turn."""
        batch = batch or self._example() or {}
        old, new = seconds_of([[whole(self.model, batch)], [whole(result, batch)]])
        return old, new

    def declines(self, site: Site, block: Block) -> str | None:
        kinds = {op.kind for op in block.ops}
        if not kinds & {"contract", "weight"}:
            return None
        version = opset(self.model)
        if version < EINSUM_OPSET:
            return f"opset {version} has no Einsum, which came with {EINSUM_OPSET}"
        if "contract" in kinds and any(use.activation.shape is None for use in self._match(site.order).uses):
            return "the rank of the activation is unknown"
        return None

    def replace(self, site: Site, new: Replacement) -> None:
        """Note a replacement; the file does not record the name of its decomposition.

        Raises VerificationError if the block cannot be written, or the factors do not fit it.
        """
        match = self._match(site.order)
        check_block(new.block)
        if new.block.kind is not site.kind:
            raise VerificationError(f"{site.name}: the block of a {new.block.kind.value} for a {site.kind.value}")
        for name, shape in new.block.factors:
            factor = new.factors.get(name)
            if factor is None or tuple(factor.shape) != shape:
                given = "none" if factor is None else list(factor.shape)
                raise VerificationError(f"{site.name}: factor {name!r} has shape {given}, not {list(shape)}")
            dtype = str(factor.dtype).removeprefix("torch.")
            if factor.is_floating_point() and dtype != match.site.dtype:
                raise VerificationError(f"{site.name}: factor {name!r} has dtype {dtype}, not {match.site.dtype}")
        self._replacements[site.order] = new

    def forget(self) -> None:
        self._replacements.clear()

    def finish(self) -> ir.Model:
        """A new model with all noted replacements; everything else is as it was."""
        copy, values = clone(self.model)
        free_names(copy)
        nodes = dict(zip(self.model.graph, copy.graph, strict=True))
        emitter = Emitter(copy)
        behind = {k: region.vectors for k, region in regions(self._matches).items()}
        hidden = units(self._matches)
        behind |= {k: vectors for found in hidden.values() for k, vectors in found.producers.items()}
        for order, new in sorted(self._replacements.items()):
            match = self._matches[order]
            bias, taken = _new_bias(match, new), match.uses[0].slot
            if new.output_order is not None:
                places = behind.get(order, ())
                vectors = [(nodes[node], k, axis) for node, k, axis in places if bias is None or (node, k) != taken]
                emitter.reorder(vectors, new.output_order.numpy())
            uses = tuple(moved(use, nodes, values) for use in match.uses)
            emitter.replace(uses, new, match.site.name, bias)
        fewer = {value.name for k in self._replacements if k in hidden for value in hidden[k].values}
        for value in (value for node in copy.graph for value in node.outputs if value.name in fewer):
            value.shape = None
        return copy


def _new_bias(match: Match, new: Replacement) -> np.ndarray | None:
    """The bias of the replacement, in float64 and in the order of its outputs; None if the old one stays.

    Statistics of another door may shift a site that has no bias here (exporters drop biases of zeros): it gets one.
    """
    use = match.uses[0]
    if new.shift is None and use.tail.norm is None:
        return None
    bias = use.bias if match.site.bias else np.zeros(use.width) if match.takes_bias else None
    if bias is None:
        return None
    if new.shift is not None:
        bias = bias + scales(use.node)[0] * double(new.shift)
    return bias if new.output_order is None else bias[new.output_order.numpy()]
