"""An ``nn.Module`` as a program: sites are the weights of its linear modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...ir import Cost, Decline, OpKind, Remark, Site
from ..program import Replacement, Tap, passed_over_weight, sketch
from .batches import Call, as_call, as_calls
from .capture import Capture, Use, capture, floating_outputs
from .factored import FactoredLinear, is_linear, linear_weight, place, stored_orientation
from .macs import MacCounter

__all__ = ["NnProgram"]


@dataclass
class _Weight:
    """One stored tensor and everything that reads it."""

    tensor: Tensor
    names: list[str]
    modules: dict[str, nn.Module]
    other: list[str]


class NnProgram:
    """Implements :class:`tdc.frontends.program.Program` for modules.

    ``example`` is one batch: with it the model is exported once, to learn the order of the weights and whether anything
    but its own linear module reads a weight. Where the export fails, the module tree and the order of calls serve.
    The model itself is not changed; :meth:`finish` works on a copy unless ``inplace``.
    """

    door = "nn"

    def __init__(self, model: nn.Module, example: Any, *, inplace: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
        _check_readable(model)
        self.model = model
        self.inplace = inplace
        self._example = as_call(model, example)
        self._positional = len(self._example[0]) or None
        self._weights = _stored_weights(model)
        self._by_order: dict[int, _Weight] = {}
        self._replacements: dict[int, Replacement] = {}

    # ---- reading

    def sites(self) -> tuple[tuple[Site, ...], tuple[Remark, ...]]:
        with _evaluation(self.model):
            seen = capture(self.model, *self._example)
            calls = {} if seen else self._call_order()
        remarks = [] if seen else [Remark("", "find-sites", seen.reason)] if isinstance(seen, Decline) else []
        found: list[tuple[int, _Weight, int, Use | None]] = []
        for weight in self._weights:
            answer = _captured_place(weight, seen) if isinstance(seen, Capture) else _called_place(weight, calls)
            reason = answer.reason if isinstance(answer, Decline) else passed_over_weight(_plain(weight.tensor))
            if reason or isinstance(answer, Decline):
                remarks.append(Remark(weight.names[0], "find-sites", reason))
            else:
                found.append((answer[0], weight, answer[1], answer[2]))
        found.sort(key=lambda entry: entry[0])
        orders = {position: k for k, (position, *_) in enumerate(found)}
        sites = []
        for k, (_, weight, uses, use) in enumerate(found):
            consumer = (
                seen.pointwise_consumer(use) if use and isinstance(seen, Capture) and _unwatched(weight) else None
            )
            site = replace(
                _site(k, weight, uses), pointwise_consumer=orders.get(consumer) if consumer is not None else None
            )
            self._by_order[k] = weight
            sites.append(site)
        return tuple(sites), tuple(remarks)

    def _call_order(self) -> dict[nn.Module, tuple[int, int]]:
        """Module -> (place of its first call, number of calls) on the example."""
        order: dict[nn.Module, tuple[int, int]] = {}

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            first, calls = order.get(module, (len(order), 0))
            order[module] = (first, calls + 1)

        modules = {m for w in self._weights for m in w.modules.values()}
        with _hooks(modules, count):
            self._run(self._example)
        return order

    def weight(self, site: Site) -> Tensor:
        weight = self._by_order[site.order]
        module = next(iter(weight.modules.values()))
        return linear_weight(module, _plain(weight.tensor)).cpu().contiguous()

    def cost(self) -> Cost:
        tensors = {_storage_key(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        floating = [t for t in tensors.values() if t.is_floating_point()]
        stored = sum(t.numel() * t.element_size() for t in tensors.values())
        with _evaluation(self.model), MacCounter() as counter:
            self._run(self._example)
        return Cost(sum(t.numel() for t in floating), stored, counter.macs)

    # ---- running

    def batches(self, calibration: Any) -> Iterator[Call]:
        return as_calls(self.model, calibration, self._positional)

    def observe(self, batch: Call, sites: Iterable[Site], tap: Tap) -> None:
        of_module = {m: site for site in sites for m in self._by_order[site.order].modules.values()}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tap(of_module[module], args[0] if args else kwargs["input"])

        with _evaluation(self.model), _hooks(of_module, hook):
            self._run(batch)

    def outputs(self, batch: Call, weights: Mapping[int, Tensor]) -> dict[str, Tensor]:
        changed: list[tuple[nn.Module, Tensor]] = []
        for order, new in weights.items():
            stored = self._by_order[order]
            for module in set(stored.modules.values()):
                changed.append((module, stored_orientation(module, new.to(stored.tensor))))
        with _evaluation(self.model), _holding(changed):
            return floating_outputs(self._run(batch))

    def _run(self, batch: Call) -> Any:
        args, kwargs = batch
        with torch.no_grad():
            try:
                return self.model(*args, **kwargs)
            except Exception as error:
                raise CalibrationError(f"the model cannot run on a batch: {type(error).__name__}: {error}") from error

    # ---- cutting

    def replace(self, site: Site, new: Replacement) -> None:
        weight = self._by_order[site.order]
        for name, module in weight.modules.items():
            if not is_linear(module):
                raise ModelError(f"{name} is no longer a linear module")
        self._replacements[site.order] = new

    def finish(self) -> nn.Module:
        replaced = [self._by_order[order] for order in self._replacements]
        model = self.model if self.inplace else _copy_without(self.model, [w.tensor for w in replaced])
        swaps = [
            swap for order, new in self._replacements.items() for swap in _swaps(model, self._by_order[order], new)
        ]
        place(model, swaps)
        return model


def _swaps(model: nn.Module, weight: _Weight, new: Replacement) -> list[tuple[str, nn.Module]]:
    """Paths and new modules for all modules that hold the weight; tied ones share the factors."""
    like = weight.tensor
    factors = {
        name: nn.Parameter(factor.to(like.device), requires_grad=like.requires_grad)
        if factor.is_floating_point()
        else factor.to(like.device)
        for name, factor in new.factors.items()
    }
    made: dict[int, FactoredLinear] = {}
    swaps: list[tuple[str, nn.Module]] = []
    for path in weight.modules:
        module = model.get_submodule(path)
        if id(module) not in made:
            made[id(module)] = FactoredLinear(module, new.block, factors, new.decomposition)
            if new.output_order is not None:
                made[id(module)].reorder_bias(new.output_order)
        swaps.append((path, made[id(module)]))
    return swaps


def _site(order: int, weight: _Weight, uses: int) -> Site:
    module = next(iter(weight.modules.values()))
    canonical = linear_weight(module, _plain(weight.tensor))
    o, i = canonical.shape
    return Site(
        kind=OpKind.LINEAR,
        sizes=(("o", o), ("i", i)),
        dtype=str(weight.tensor.dtype).removeprefix("torch."),
        order=order,
        sketch=sketch(canonical.cpu()),
        names=tuple(weight.names),
        uses=uses,
    )


def _plain(tensor: Tensor) -> Tensor:
    """Without gradient, also where the tensor was made in inference mode (``detach`` of such a one does not do)."""
    with torch.no_grad():
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory; tensors without storage count by themselves."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _stored_weights(model: nn.Module) -> list[_Weight]:
    """All matrices (and higher) of the model by storage, with the linear modules and the others that hold them."""
    found: dict[tuple[Any, ...], _Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module._parameters.items():
            if tensor is None or tensor.ndim < 2:
                continue
            full = f"{path}.{name}" if path else name
            weight = found.setdefault(_storage_key(tensor), _Weight(tensor, [], {}, []))
            weight.names.append(full)
            if name == "weight" and path and is_linear(module):
                weight.modules[path] = module
            else:
                itself = "" if path or not is_linear(module) else ", the model itself (put it into an nn.Sequential)"
                weight.other.append(f"{full} of {type(module).__name__}{itself}")
    return list(found.values())


def _held_elsewhere(weight: _Weight) -> Decline | None:
    if not weight.modules:
        return Decline(f"held by {', '.join(weight.other)}: only linear modules are handled")
    if weight.other:
        return Decline(f"tied to {', '.join(weight.other)}, which is not a linear module; all uses stay dense together")
    if len({is_linear(m) and linear_weight(m, weight.tensor).shape for m in weight.modules.values()}) > 1:
        return Decline("its uses disagree about which axis is the output")
    return None


def _unwatched(weight: _Weight) -> bool:
    """No hook looks at what goes into or comes out of its modules."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in weight.modules.values())


Place = tuple[int, int, Use | None]


def _captured_place(weight: _Weight, seen: Capture) -> Place | Decline:
    """Position of the first use, number of uses, and the use if there is one only; from the exported graph."""
    held = _held_elsewhere(weight)
    if held is not None:
        return held
    uses = [use for name in weight.names for use in seen.uses.get(name, ())]
    if not uses:
        return Decline("the example inputs do not reach it")
    for use in uses:
        if not use.linear:
            return Decline(f"also read by {use.operator}, which is not linear in it")
        if use.module not in weight.modules:
            return Decline(
                f"read by {use.operator} in {use.module or 'the model'} past its own module, which cannot be swapped"
            )
    uses.sort(key=lambda use: use.position)
    return uses[0].position, len(uses), uses[0] if len(uses) == 1 else None


def _called_place(weight: _Weight, calls: Mapping[nn.Module, tuple[int, int]]) -> Place | Decline:
    """The same from the calls of the modules."""
    held = _held_elsewhere(weight)
    if held is not None:
        return held
    made = [calls[module] for module in set(weight.modules.values()) if module in calls]
    if not made:
        return Decline("its module is not called on the example inputs")
    return min(first for first, _ in made), sum(count for _, count in made), None


def _copy_without(model: nn.Module, tensors: Iterable[Tensor]) -> nn.Module:
    """A deep copy that shares the given parameters, since they are about to be replaced."""
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {first}); inplace=True changes the model itself"
        ) from error


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, with fixed random numbers; modes, buffers and random state are as before after it.

    The fused kernels of ``nn.TransformerEncoder`` are off: they pass hooks by, and make nested tensors.
    """
    training = [module for module in model.modules() if module.training]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@contextmanager
def _holding(weights: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Modules with other weights inside. (``torch.func.functional_call`` does not put back what a module found by two
    paths shares with another module.)
    """
    held = [(module, module._parameters["weight"], new) for module, new in weights]
    try:
        for module, _, new in held:
            module._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for module, own, _ in held:
            module._parameters["weight"] = own


def _check_readable(model: nn.Module) -> None:
    """Raises ModelError for modules whose weights cannot be read or exchanged."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be rewritten: give the nn.Module that it was made from")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} is not initialized yet (a lazy module): run the model on one batch first")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device, where weights have no values: load the weights first")


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
