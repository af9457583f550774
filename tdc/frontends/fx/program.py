"""An ATen graph as a program: sites are the weights that its operators are linear in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import CalibrationError, ModelError
from ...ir import Block, Cost, Remark, Site, window_attributes
from ..clock import seconds_of
from ..graph import added_to, fold_norm, gain_before, memory_format, run_backward
from ..lockstep import Meet, Visit, in_step
from ..program import Change, Loss, Replacement, Tap, sketch, unpadded_of
from .captured import Bound, Override, Values, alongside, passes_on, undisturbed
from .cost import graph_cost
from .emit import Kernels, casts
from .match import Use, Weight, canonical, match, plain, storage_key
from .override import marked, with_weight
from .rewrite import (
    Cut,
    Rewritten,
    hidden_readers,
    pointwise_reader_of,
    reader_of,
    rewrite,
    sources,
    takes_any_order,
)
from .timing import Stopwatch, met_in

__all__ = ["Batch", "FxProgram"]

Batch = tuple[int, Values]
"""A place among the program's graphs, and the inputs of that graph."""


class FxProgram:
    """Implements :class:`tdc.frontends.program.Program` for one graph, or for several that hold the same weights (a
    graph and what became of it for other shapes): the first one has the sites, each batch runs through its own.

    ``kernels``: what blocks are timed with, as the graph is to have them. ``pause`` is called between steps of long
    work.
    """

    door = "fx"

    def __init__(
        self,
        bounds: Sequence[Bound],
        example: Batch | None = None,
        *,
        kernels: Kernels | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self.bounds, self.example, self.kernels, self.pause = tuple(bounds), example, kernels, pause
        self._matched = [match(bound) for bound in self.bounds]
        self._by_order = dict(enumerate(self._matched[0][0]))
        self._elsewhere = [{storage_key(w.tensor): w for w in found} for found, _ in self._matched]
        self.replacements: dict[int, Replacement] = {}
        self._seen = example

    # ---- reading

    def sites(self) -> tuple[tuple[Site, ...], tuple[Remark, ...]]:
        readers = {w.uses[0].node: k for k, w in self._by_order.items() if len(w.uses) == 1}
        weights = [*self._by_order.values()]
        hidden = hidden_readers(weights)
        sites = []
        for k, weight in self._by_order.items():
            self.pause()
            consumer = None
            if len(weight.uses) == 1 and takes_any_order(weight.uses[0]):
                reader = pointwise_reader_of(weight)
                consumer = readers.get(reader) if reader is not None else None
            found = replace(self._site(k, weight), pointwise_consumer=consumer, hidden_producers=hidden.get(k, ()))
            sites.append(found)
        return tuple(sites), tuple(self._matched[0][1])

    def _site(self, order: int, weight: Weight) -> Site:
        folded, form, use = self._folded(order)[0], weight.form, weight.uses[0]
        kind, single = form.kind, len(weight.uses) == 1
        activation = use.activation.meta.get("val")
        last = memory_format(plain(weight.tensor)) is not None
        last = last or (single and isinstance(activation, Tensor) and memory_format(activation) is not None)
        return Site(
            kind=kind,
            sizes=_sizes(weight),
            dtype=str(weight.tensor.dtype).removeprefix("torch."),
            order=order,
            sketch=sketch(folded.cpu()),
            names=self.names(weight),
            uses=len(weight.uses),
            attributes=window_attributes(form.windows) if kind.is_conv else (),
            bias=single and (weight.norm is not None or use.root_bias is not None),
            norm=self._norm_name(weight),
            layout="channels_last" if kind.is_conv and last else "",
            lengths=_lengths(use) if kind.is_conv and single else (),
        )

    def names(self, weight: Weight) -> tuple[str, ...]:
        names = self.bounds[0].captured.names
        return tuple(dict.fromkeys(name for root in weight.roots for name in names[root]))

    def _norm_name(self, weight: Weight) -> str:
        if weight.norm is None:
            return ""
        mean = weight.norm.state["running_mean"]
        assert mean is not None
        return self.bounds[0].captured.names[mean][0].rpartition(".")[0]

    def _folded(self, order: int) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias, with the normalisation behind folded into them."""
        weight, tensors = self._by_order[order], self.bounds[0].tensors
        root = weight.uses[0].root_bias
        own = canonical(weight.form, plain(weight.tensor))
        bias = None if root is None else plain(tensors[root])
        if weight.norm is None:
            return own, bias
        state = {name: None if node is None else plain(tensors[node]) for name, node in weight.norm.state.items()}
        return fold_norm(own, bias, state, weight.norm.eps)

    def weight(self, site: Site) -> Tensor:
        self.pause()
        return self._folded(site.order)[0].cpu().contiguous()

    def gain(self, site: Site) -> Tensor | None:
        use, bound = self._by_order[site.order].uses[0], self.bounds[0]
        if site.uses > 1 or site.kind.is_conv:
            return None
        roots = {root.name: root for root in bound.tensors}
        name = gain_before(use.node, {root: root.name for root in roots.values()})
        return None if name is None else plain(bound.tensors[roots[name]]).cpu()

    def origins(self, site: Site) -> tuple[Tensor, ...]:
        """The tensors from which the factors and the bias of a site are made."""
        return tuple(self.bounds[0].tensors[node] for node in sources(self._by_order[site.order]))

    def remembering(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        return nullcontext()

    def cost(self, batch: Batch | None = None) -> Cost:
        place, values = batch or self.example or (0, None)
        return graph_cost(self.bounds[place], self.bounds[0].tensors.values(), values)

    def cost_of(self, new: Rewritten) -> Cost:
        """The same of the program's first graph after it was rewritten."""
        after = self._after(new)
        values = self.example[1] if self.example is not None and self.example[0] == 0 else None
        return graph_cost(after, after.tensors.values(), values)

    def _after(self, new: Rewritten) -> Bound:
        """The program's first graph after it was rewritten."""
        captured, tensors = self.bounds[0].captured, self.bounds[0].tensors
        placeholders = new.module.graph.find_nodes(op="placeholder")
        held = {
            node: tensors[captured.placeholders[old]]
            for node, old in zip(placeholders, new.kept, strict=False)
            if captured.placeholders[old] in captured.names
        }
        held |= dict(zip(placeholders[len(new.kept) :], new.constants.values(), strict=True))
        own = {str(node.target): tensor for node, tensor in tensors.items() if node.op == "get_attr"}
        attributes = new.module.graph.find_nodes(op="get_attr")
        held |= {node: own[str(node.target)] for node in attributes if str(node.target) in own}
        names = {node: (node.name,) for node in held}
        return Bound(replace(captured, module=new.module, names=names), held)

    # ---- running

    def batches(self, calibration: Any) -> Iterator[Batch]:
        """Records (a place and values) as they are; anything else is read by the first graph."""
        captured = self.bounds[0].captured
        if isinstance(calibration, (Tensor, Mapping)):
            calibration = [calibration]
        if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
            raise CalibrationError(
                f"calibration must be an iterable of batches (a list, a DataLoader); got {type(calibration).__name__}"
            )
        for batch in calibration:
            yield batch if _is_record(batch) else (0, captured.read(batch))

    def unpadded(self, batch: Batch) -> Tensor | None:
        place, values = batch
        return unpadded_of(dict(zip(self.bounds[place].captured.arguments, values, strict=False)))

    def observe(self, batch: Batch, sites: Iterable[Site], tap: Tap) -> None:
        place, values = batch
        self._seen = self._seen or batch
        taps: dict[fx.Node, list[Callable[[Any], None]]] = {}
        for site in sites:
            weight = self._in(place, site.order)
            for use in weight.uses if weight is not None else ():
                spot = use.node.args.index(use.activation)
                taps.setdefault(use.node, []).append(lambda args, site=site, spot=spot: tap(site, args[spot]))  # type: ignore[misc]
        self.pause()
        self.bounds[place].run(values, taps=taps)

    def gradients(self, batch: Batch, sites: Iterable[Site], loss: Loss, tap: Tap, read: Tap | None = None) -> str:
        place, values = batch
        marks: dict[fx.Node, Override] = {}
        for site in sites:
            weight = self._in(place, site.order)
            if weight is not None:
                behind = [use.node for use in weight.uses] if weight.norm is None else [weight.norm.node]
                marks |= {node: marked(site, tap) for node in behind}
        self.pause()
        bound = self.bounds[place]
        try:
            return str(bound.run(values, marks=marks, after=lambda out: run_backward(loss, bound.captured.label(out))))
        except CalibrationError as error:  # it runs without gradients: the moments were gathered
            return str(error)

    def lockstep(self, batches: Sequence[Batch], sites: Iterable[Site], visit: Visit) -> str:
        wanted = list(sites)

        def work(batch: Batch, changing: bool) -> Callable[[Meet], Any]:
            place, values = batch

            def run(meet: Meet) -> None:
                changes, beside = self._meetings(place, wanted, meet, changing)
                with alongside():  # all runs are inside one that leaves the process as it was
                    self.bounds[place].run(values, changes=changes, beside=beside)

            return run

        self.pause()
        with undisturbed():
            return in_step([work(batch, changing) for changing in (False, True) for batch in batches], wanted, visit)

    def _meetings(
        self, place: int, sites: Iterable[Site], meet: Meet, changing: bool
    ) -> tuple[dict[fx.Node, Override], dict[fx.Node, fx.Node]]:
        """Nodes that wait for the other runs, and then run with the weight that the site has got; and what their output
        is added to.
        """
        instead: dict[fx.Node, Override] = {}
        beside: dict[fx.Node, fx.Node] = {}
        changed: set[int] = set()

        def enter(site: Site, use: Use, output: fx.Node) -> Override:
            spot = use.node.args.index(use.activation)
            sum_with = use.rest or added_to(output)
            if sum_with is not None and sum_with < use.node:
                beside[use.node] = sum_with

            def run(args: tuple[Any, ...]) -> Any:
                change = meet(site, args[spot], args[-1] if use.node in beside else None)
                if not changing or change is None:
                    return NotImplemented
                changed.add(site.order)
                return with_weight(use, change.weight, self._shifted(site.order, change.shift))(args)

            return run

        for site in sites:
            weight, order = self._in(place, site.order), site.order
            if weight is None or (weight.norm is None) != (self._by_order[order].norm is None):
                continue
            for use in weight.uses:
                instead[use.node] = enter(site, use, use.node if weight.norm is None else weight.norm.output)
            if weight.norm is not None:
                handed = passes_on(weight.norm.node)
                instead[weight.norm.node] = lambda args, order=order, handed=handed: (  # type: ignore[misc]
                    handed(args) if order in changed else NotImplemented
                )
        return instead, beside

    def outputs(self, batch: Batch, changes: Mapping[int, Change]) -> dict[str, Tensor]:
        place, values = batch
        instead: dict[fx.Node, Override] = {}
        for order, change in changes.items():
            weight, own = self._in(place, order), self._by_order[order]
            if weight is None or (weight.norm is None) != (own.norm is None):
                raise CalibrationError(f"a batch went through a graph that reads {self.names(own)[0]} in another way")
            bias = self._shifted(order, change.shift)
            instead |= {use.node: with_weight(use, change.weight, bias) for use in weight.uses}
            if weight.norm is not None:
                instead[weight.norm.node] = passes_on(weight.norm.node)
        self.pause()
        return dict(self.bounds[place].outputs(values, instead))

    def _in(self, place: int, order: int) -> Weight | None:
        """The weight of a site as another graph reads it."""
        own = self._by_order[order]
        return own if place == 0 else self._elsewhere[place].get(storage_key(own.tensor))

    def _shifted(self, order: int, shift: Tensor | None) -> Tensor | None:
        """The bias that a site gets with another weight; None if it keeps its own."""
        if shift is None and self._by_order[order].norm is None:
            return None
        bias = self._folded(order)[1]
        assert bias is not None
        return bias if shift is None else (bias.double() + shift.to(bias.device)).to(bias.dtype)

    # ---- cutting

    def stopwatch(self, sites: Iterable[Site], batch: Batch | None = None) -> Stopwatch | str:
        """On the example, else on the first batch that was observed."""
        batch = batch or self._seen
        if batch is None:
            return "that is measured on example inputs or calibration data, and there are none"
        place, values = batch
        bound, sites = self.bounds[place], tuple(sites)
        uses = {site.order: weight.uses for site in sites if (weight := self._in(place, site.order)) is not None}
        self.pause()
        kernels = None if casts(bound.captured.module.graph) else self.kernels
        return Stopwatch(bound.repeated(values), sites, met_in(bound, values, uses), kernels)

    def times(self, new: Rewritten, batch: Batch | None = None) -> tuple[float, float]:
        """Seconds of a run of the program's first graph and of what came of it, called in turn."""
        given = batch or self._seen
        assert given is not None
        with undisturbed():
            old, small = seconds_of([[bound.repeated(given[1])] for bound in (self.bounds[0], self._after(new))])
        return old, small

    def declines(self, site: Site, block: Block) -> str | None:
        return None

    def replace(self, site: Site, new: Replacement) -> None:
        if site.order not in self._by_order:
            raise ModelError(f"{site.name} is no site of this graph")
        self.replacements[site.order] = new

    def forget(self) -> None:
        self.replacements.clear()

    def finish(self) -> Rewritten:
        """A new graph; that of the program stays."""
        return rewrite(self.bounds[0].captured, self._matched[0][0], self.cuts())

    def cuts(self) -> dict[int, Cut]:
        """What takes the place of every replaced weight, by the ``id`` of the tensors that hold it: all that another
        graph with the same weights needs.
        """
        found: dict[int, Cut] = {}
        for order, new in self.replacements.items():
            weight = self._by_order[order]
            bias = self._shifted(order, new.shift)
            if new.output_order is not None:
                bias = self._folded(order)[1] if bias is None else bias
                bias = None if bias is None else bias[new.output_order.to(bias.device)]
            weights = [*self._by_order.values()]
            reader = reader_of(weight, weights) if new.output_order is not None else None
            behind = next((w for w in self._by_order.values() if reader is not None and w.uses[0].node is reader), None)
            cut = Cut(
                replace(new, factors={name: _stored(factor, weight.tensor) for name, factor in new.factors.items()}),
                bias,
                self.names(weight)[0],
                "" if new.lead is None else self.names(self._by_order[new.lead])[0],
                weight.form,
                weight.norm is not None,
                len(weight.uses) == 1,
                None if behind is None else tuple(id(self.bounds[0].tensors[root]) for root in behind.roots),
            )
            found |= {id(self.bounds[0].tensors[root]): cut for root in weight.roots}
        return found


def _is_record(batch: Any) -> bool:
    return isinstance(batch, tuple) and len(batch) == 2 and type(batch[0]) is int and isinstance(batch[1], tuple)


def _sizes(weight: Weight) -> tuple[tuple[str, int], ...]:
    shape, form = canonical(weight.form, weight.tensor).shape, weight.form
    if not form.kind.is_conv:
        return (("o", shape[0]), ("i", shape[1]))
    taps = zip(form.kind.windows, shape[2:], strict=True)
    return (("g", form.groups), ("o", shape[0] // form.groups), ("i", shape[1]), *taps)


def _lengths(use: Use) -> tuple[tuple[str, int, int], ...]:
    """(axis, input, output) of each window axis on the example; of a symbolic length, its size there."""
    axes = len(use.form.windows)
    before, after = use.activation.meta.get("val"), use.node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return ()
    pairs = zip(before.shape[-axes:], after.shape[-axes:], strict=True)
    return tuple((w.axis, _hint(a), _hint(b)) for w, (a, b) in zip(use.form.windows, pairs, strict=True))


def _hint(size: Any) -> int:
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)


def _stored(factor: Tensor, like: Tensor) -> Tensor:
    """A factor on the device of the weight that it replaces, in its memory format."""
    moved = factor.to(like.device)
    wanted = memory_format(plain(like))
    if wanted is not None and moved.is_floating_point() and moved.ndim == like.ndim:
        return moved.contiguous(memory_format=wanted)
    return moved
