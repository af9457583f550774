"""An ``nn.Module`` as a program: sites are the weights of its linear and convolution modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...ir import Block, Cost, Decline, Remark, Site, window_attributes
from ..count import Counter
from ..graph import floating_outputs, memory_format, run_backward
from ..lockstep import Meet, Visit, in_step
from ..program import Change, Loss, Replacement, Tap, passed_over_weight, sketch
from .attention import open_above, opened
from .batches import Call, answer, as_call, as_calls, copied, unpadded_in
from .capture import Capture, Use, capture
from .factored import Factored, factored
from .fold import Norm, fold
from .layers import canonical_weight, kind_of, padded, stored_weight, weight_sizes, windows_of
from .placing import place
from .prefix import Prefix, prefixes
from .reads import Reads, marking
from .residual import Connections, Kept
from .running import copy_without, evaluation, holding, hooks, pre_hooks, standing_in, untrained
from .sharing import Sharing
from .timing import Stopwatch
from .weights import (
    Weight,
    called_place,
    captured_place,
    check_readable,
    is_unwatched,
    plain,
    storage_key,
    stored_weights,
)

__all__ = ["NnProgram"]


class NnProgram:
    """Implements :class:`tdc.frontends.program.Program` for modules.

    ``example`` is one batch: with it the model is exported once, to learn the order of the weights, whether anything
    but its own module reads a weight, and which normalisations can be folded. Where the export fails, the module tree
    and the order of calls serve. The model itself is not changed; :meth:`finish` works on a copy unless ``inplace``.
    """

    door = "nn"

    def __init__(self, model: nn.Module, example: Any, *, inplace: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
        check_readable(model)
        self.model = model
        self.inplace = inplace
        self._example = as_call(model, example)
        self._positional = len(self._example[0]) or None
        with opened(model):
            self._weights = stored_weights(model)
        self._by_order: dict[int, Weight] = {}
        self._norms: dict[int, Norm] = {}
        self._gains: dict[int, Tensor] = {}
        self._replacements: dict[int, Replacement] = {}
        self._prefixes: dict[int, Prefix] = {}

    # ---- reading

    def sites(self) -> tuple[tuple[Site, ...], tuple[Remark, ...]]:
        with evaluation(self.model):
            seen = capture(self.model, *self._example)
            calls = {} if seen else self._call_order()
        remarks = [] if seen else [Remark("", "find-sites", seen.reason)] if isinstance(seen, Decline) else []
        found: list[tuple[int, Weight, int, Use | None]] = []
        for weight in self._weights:
            answer = captured_place(weight, seen) if isinstance(seen, Capture) else called_place(weight, calls)
            reason = answer.reason if isinstance(answer, Decline) else passed_over_weight(plain(weight.tensor))
            if reason or isinstance(answer, Decline):
                remarks.append(Remark(weight.names[0], "find-sites", reason))
            else:
                found.append((answer[0], weight, answer[1], answer[2]))
        found.sort(key=lambda entry: entry[0])
        sites = []
        for k, (_, weight, uses, use) in enumerate(found):
            self._by_order[k] = weight
            norm = seen.norm_behind(use, self.model) if use and isinstance(seen, Capture) else None
            if norm is not None and is_unwatched(weight):
                self._norms[k] = norm
            gain = seen.gain_before(use) if use and isinstance(seen, Capture) and use.is_linear else None
            if gain is not None:
                self._gains[k] = self.model.get_parameter(gain)
            sites.append(self._site(k, uses, use))
        if isinstance(seen, Capture):
            sites = self._with_consumers(sites, seen, [use for *_, use in found])
        return tuple(sites), tuple(remarks)

    def _with_consumers(self, sites: list[Site], seen: Capture, uses: list[Use | None]) -> list[Site]:
        free = {k: use for k, use in enumerate(uses) if use and is_unwatched(self._by_order[k])}
        orders = {use.position: k for k, use in enumerate(uses) if use}
        outputs = {use.node: k for k, use in free.items() if k not in self._norms and sites[k].uses == 1}
        unread = {n for w in self._weights if not any(seen.uses.get(name) for name in w.names) for n in w.tensor.shape}
        linked = []
        for k, site in enumerate(sites):
            consumer, producers = None, tuple[int, ...]()
            if k in free and site.axes["o"] not in unread:  # what the example does not reach could read them
                consumer = seen.pointwise_consumer(free[k], self._norms.get(k))
            if k in free and site.axes["i"] not in unread:
                producers = seen.hidden_producers(free[k], outputs)
            reader = orders.get(-1 if consumer is None else consumer)
            linked.append(replace(site, pointwise_consumer=reader, hidden_producers=producers))
        return linked

    def _site(self, order: int, uses: int, use: Use | None) -> Site:
        weight, norm = self._by_order[order], self._norms.get(order)
        module = next(iter(weight.modules.values()))
        kind = kind_of(module)
        assert kind is not None
        folded = self._folded(order)
        lengths = use.lengths if use and kind.is_conv else None
        channels_last = memory_format(plain(weight.tensor)) is not None or (use is not None and use.channels_last)
        biased = norm is not None or all(m._parameters.get("bias") is not None for m in weight.modules.values())
        return Site(
            kind=kind,
            sizes=weight_sizes(module, weight.tensor),
            dtype=str(weight.tensor.dtype).removeprefix("torch."),
            order=order,
            sketch=sketch(folded.cpu()),
            names=tuple(weight.names),
            uses=uses,
            attributes=window_attributes(windows_of(module)) if kind.is_conv else (),
            bias=biased and uses == 1,
            norm=norm.path if norm else "",
            layout="channels_last" if kind.is_conv and channels_last else "",
            lengths=tuple(zip(kind.windows, *lengths, strict=True)) if lengths else (),
        )

    def _folded(self, order: int) -> Tensor:
        """Canonical weight, with the normalisation behind folded into it."""
        weight, norm = self._by_order[order], self._norms.get(order)
        canonical = canonical_weight(next(iter(weight.modules.values())), plain(weight.tensor))
        return canonical if norm is None else fold(canonical, None, norm.module)[0]

    def _call_order(self) -> dict[nn.Module, tuple[int, int]]:
        """Module -> (place of its first call, number of calls) on the example."""
        order: dict[nn.Module, tuple[int, int]] = {}

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            first, calls = order.get(module, (len(order), 0))
            order[module] = (first, calls + 1)

        modules = {m for w in self._weights for m in w.modules.values()}
        with pre_hooks(modules, count):
            self._run(self._example)
        return order

    def weight(self, site: Site) -> Tensor:
        return self._folded(site.order).cpu().contiguous()

    def gain(self, site: Site) -> Tensor | None:
        gain = self._gains.get(site.order)
        return None if gain is None else plain(gain).cpu()

    def cost(self, batch: Call | None = None) -> Cost:
        tensors = {storage_key(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        floating = [t for t in tensors.values() if t.is_floating_point()]
        stored = sum(t.numel() * t.element_size() for t in tensors.values())
        call = copied(batch or self._example)
        with evaluation(self.model), torch.no_grad(), Counter() as counter:
            answer(self.model, call)
        return Cost(sum(t.numel() for t in floating), stored, counter.macs, counter.peak)

    # ---- running

    def batches(self, calibration: Any) -> Iterator[Call]:
        return as_calls(self.model, calibration, self._positional)

    def unpadded(self, batch: Call) -> Tensor | None:
        return unpadded_in(self.model, batch)

    def observe(self, batch: Call, sites: Iterable[Site], tap: Tap) -> None:
        of_module = {m: site for site in sites for m in self._by_order[site.order].modules.values()}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tap(of_module[module], padded(module, args[0] if args else kwargs["input"]))

        with evaluation(self.model), pre_hooks(of_module, hook):
            self._run(batch)

    def gradients(self, batch: Call, sites: Iterable[Site], loss: Loss, tap: Tap, read: Tap | None = None) -> str:
        watched: dict[nn.Module, Site] = {}
        of_module: dict[nn.Module, Site] = {}
        for site in sites:
            norm, own = self._norms.get(site.order), self._by_order[site.order].modules.values()
            watched |= dict.fromkeys(own if norm is None else [norm.module], site)
            of_module |= dict.fromkeys(own, site)
        reads = Reads(of_module)
        with evaluation(self.model), untrained(self.model), hooks(watched, marking(watched, tap)), torch.enable_grad():
            try:
                with pre_hooks(of_module if read is not None else (), reads.hook):
                    outputs = floating_outputs(answer(self.model, copied(batch)))
            except CalibrationError as error:  # it runs without gradients: the moments can be gathered
                return str(error)
            failed = run_backward(loss, outputs)
        if read is not None and not failed:
            reads.hand(read)
        return failed

    def lockstep(self, batches: Sequence[Call], sites: Iterable[Site], visit: Visit) -> str:
        of_module = {m: site for site in sites for m in self._by_order[site.order].modules.values()}
        norms = {n.module: order for order, n in self._norms.items() if order in {s.order for s in of_module.values()}}
        connections = self._connections(batches[0], {m: site.order for m, site in of_module.items()}, norms)
        own = threading.local()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with own.kept.apart():
                meet(module, args[0] if args else kwargs["input"])

        def meet(module: nn.Module, given: Tensor) -> None:
            site = of_module[module]
            change = own.meet(site, padded(module, given), own.kept.beside(site.order))
            if own.changing and change is not None:
                own.changed.add(site.order)
                own.held = [(name, module._parameters.get(name)) for name in ("weight", "bias")]
                for name, new in self._held(site.order, module, change):
                    module._parameters[name] = nn.Parameter(new, requires_grad=False)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for name, value in own.__dict__.pop("held", ()):
                module._parameters[name] = value

        def skip(module: nn.Module, args: Any, output: Any) -> Any:
            if norms[module] not in own.changed:
                return None
            own.kept.exchange(output, args[0])
            return args[0]

        def work(batch: Call, changing: bool) -> Callable[[Meet], Any]:
            def run(meet: Meet) -> None:
                own.meet, own.changing, own.changed, own.kept = meet, changing, set(), Kept(connections)
                with torch.inference_mode(False), own.kept:
                    self._run(batch)

            return run

        works = [work(batch, changing) for changing in (False, True) for batch in batches]
        with (
            evaluation(self.model),
            pre_hooks(of_module, enter),
            hooks(of_module, leave),
            hooks(norms, skip),
        ):
            return in_step(works, of_module.values(), visit)

    def _connections(
        self, batch: Call, sites: Mapping[nn.Module, int], norms: Mapping[nn.Module, int]
    ) -> dict[int, tuple[int, str]]:
        """See :class:`.residual.Connections`; the output of a site is that of the normalisation folded into it."""
        behind = {order: module for module, order in norms.items()}
        ends = {behind.get(order, module): order for module, order in sites.items()}
        watched = Connections()

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            watched.enter(sites[module])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            watched.leave(ends[module], output)

        with evaluation(self.model), pre_hooks(sites, enter), hooks(ends, leave), watched:
            self._run(batch)
        return watched.found

    def outputs(self, batch: Call, changes: Mapping[int, Change]) -> dict[str, Tensor]:
        parameters: list[tuple[nn.Module, str, Tensor]] = []
        norms: list[str] = []
        for order, new in changes.items():
            for module in set(self._by_order[order].modules.values()):
                parameters += [(module, name, value) for name, value in self._held(order, module, new)]
            norms += self._norms[order].paths if order in self._norms else ()
        known = self._prefixes.get(id(batch))
        late = nullcontext() if known is None or not changes else known.skipping(known.before(self._modules(changes)))
        with evaluation(self.model), holding(parameters), late, standing_in(self.model, norms):
            return self._outputs(batch)

    @contextmanager
    def remembering(self, batches: Sequence[Call]) -> Iterator[None]:
        watched, runs = self._modules(self._by_order), {id(batch): partial(self._outputs, batch) for batch in batches}
        with evaluation(self.model):
            self._prefixes = prefixes(self.model, watched, runs)
        try:
            yield
        finally:
            self._prefixes = {}

    def _modules(self, orders: Iterable[int]) -> list[nn.Module]:
        """All that run with the weights of these sites, and the normalisations behind them."""
        own = [module for order in orders for module in self._by_order[order].modules.values()]
        return own + [self._norms[order].module for order in orders if order in self._norms]

    def _held(self, order: int, module: nn.Module, new: Change) -> list[tuple[str, Tensor]]:
        """The parameters that a module of a site has with another weight."""
        weight = stored_weight(module, new.weight.to(self._by_order[order].tensor))
        bias = self._shifted(order, module, new.shift)
        return [("weight", weight), *([("bias", bias)] if bias is not None else [])]

    def _shifted(self, order: int, module: nn.Module, shift: Tensor | None) -> Tensor | None:
        """The bias that a module of a site gets with another weight; None if it keeps its own."""
        own, norm = module._parameters.get("bias"), self._norms.get(order)
        if shift is None and norm is None:
            return None
        bias, like = None if own is None else plain(own), self._by_order[order].tensor
        if norm is not None:
            _, bias = fold(canonical_weight(module, plain(like)), bias, norm.module)
        before = like.new_zeros(()) if bias is None else bias
        return before if shift is None else (before.double() + shift.to(like.device)).to(like.dtype)

    def _outputs(self, batch: Call) -> dict[str, Tensor]:
        return floating_outputs(self._run(batch))

    def _run(self, batch: Call) -> Any:
        with torch.no_grad():
            return answer(self.model, copied(batch))

    def stopwatch(self, sites: Iterable[Site], batch: Call | None = None) -> Stopwatch:
        batch = batch or self._example
        met: dict[int, list[Tensor]] = {}
        if sites := tuple(sites):  # asked for none, it says that times can be had
            self.observe(batch, sites, lambda site, x: met.setdefault(site.order, []).append(torch.randn_like(x)))
        modules = {order: next(iter(self._by_order[order].modules.values())) for order in met}
        layers = {order: (modules[order], own) for order, own in met.items()}
        return Stopwatch(lambda: self._run(batch), lambda: evaluation(self.model, timed=True), layers)

    # ---- cutting

    def declines(self, site: Site, block: Block) -> str | None:
        return None

    def replace(self, site: Site, new: Replacement) -> None:
        weight = self._by_order[site.order]
        for name, module in weight.modules.items():
            if kind_of(module) is not site.kind:
                raise ModelError(f"{name} is no longer a {site.kind.value} module")
        self._replacements[site.order] = new

    def forget(self) -> None:
        self._replacements.clear()

    def finish(self) -> nn.Module:
        replaced = [self._by_order[order] for order in self._replacements]
        model = self.model if self.inplace else copy_without(self.model, [w.tensor for w in replaced])
        open_above(model, (path for weight in replaced for path in weight.modules))
        swaps: list[tuple[str, nn.Module]] = []
        groups: dict[int, Sharing] = {}
        for order, new in sorted(self._replacements.items()):
            sharing = None if new.lead is None else groups.setdefault(new.lead, Sharing(new.shared))
            swaps += self._swaps(model, order, new, sharing)
            swaps += [(path, nn.Identity()) for path in self._norms[order].paths] if order in self._norms else []
        place(model, swaps)
        return model

    def _swaps(
        self, model: nn.Module, order: int, new: Replacement, sharing: Sharing | None
    ) -> list[tuple[str, nn.Module]]:
        """Paths and new modules for all modules that hold the weight; tied ones share the factors."""
        weight, like = self._by_order[order], self._by_order[order].tensor
        factors = {name: _stored(factor, like) for name, factor in new.factors.items()}
        made: dict[int, Factored] = {}
        swaps: list[tuple[str, nn.Module]] = []
        for path in weight.modules:
            module = model.get_submodule(path)
            if id(module) not in made:
                bias, shifted = module._parameters.get("bias"), self._shifted(order, module, new.shift)
                if shifted is not None:
                    trained = like.requires_grad if bias is None else bias.requires_grad
                    bias = nn.Parameter(shifted.clone(), requires_grad=trained)
                made[id(module)] = factored(module, new.block, factors, new.decomposition, bias, sharing)
                if new.output_order is not None:
                    made[id(module)].reorder_bias(new.output_order)
            swaps.append((path, made[id(module)]))
        return swaps


def _stored(factor: Tensor, like: Tensor) -> Tensor:
    """A factor on the device of the weight that it replaces, trainable if that was, in its memory format."""
    moved = factor.to(like.device)
    if not factor.is_floating_point():
        return moved
    wanted = memory_format(plain(like))
    if wanted is not None and moved.ndim == like.ndim:
        moved = moved.contiguous(memory_format=wanted)
    return nn.Parameter(moved, requires_grad=like.requires_grad)
