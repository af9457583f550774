"""Running a module as it will be used, and for a while with other weights, and leaving no trace of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .attention import opened
from .products import fast_products

__all__ = ["copy_without", "evaluation", "holding", "hooks", "pre_hooks", "standing_in", "untrained"]


M = TypeVar("M", bound=nn.Module)


@contextmanager
def evaluation(model: nn.Module, *, timed: bool = False, fused: bool = False) -> Iterator[None]:
    """Evaluation mode inside, with fixed random numbers; modes, buffers and random state are as before after it.

    Unless ``fused``, the fused kernels of ``nn.TransformerEncoder`` are off, which pass hooks by and make nested
    tensors, and the projections of ``nn.MultiheadAttention`` are layers. Products of matrices are by the faster
    library, unless the time is what matters (``timed``).
    """
    with nullcontext() if fused else opened(model):
        yield from _evaluation(model, timed, fused)


def _evaluation(model: nn.Module, timed: bool, fused: bool) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    held = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    enabled = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(enabled and fused)
    try:
        with torch.random.fork_rng(devices), nullcontext() if timed else fast_products():
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for module in training:
            module.training = True
        for own, were in held:
            if any(own.get(name) is not buffer for name, buffer in were.items()):
                own.update(were)
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@contextmanager
def holding(parameters: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Modules with other parameters inside: (module, name, values). (``torch.func.functional_call`` does not put back
    what a module found by two paths shares with another module.)
    """
    held = [(module, name, module._parameters.get(name), new) for module, name, new in parameters]
    try:
        for module, name, _, new in held:
            module._parameters[name] = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for module, name, own, _ in held:
            module._parameters[name] = own


@contextmanager
def standing_in(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The modules at these paths replaced by ones that hand their input on."""
    held = []
    for path in paths:
        parent, _, child = path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        held.append((modules, child, modules[child]))
    try:
        for modules, child, _ in held:
            modules[child] = nn.Identity()
        yield
    finally:
        for modules, child, own in held:
            modules[child] = own


@contextmanager
def pre_hooks(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Forward hooks inside; what a hook returns takes the place of the output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def copy_without(model: M, tensors: Iterable[Tensor] = ()) -> M:
    """A deep copy that shares the given parameters, since they are about to be replaced; of tensors that a forward has
    left behind, with their graph, the values.
    """
    left = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and v.grad_fn]
    known = {id(tensor): tensor for tensor in tensors} | {id(tensor): tensor.detach().clone() for tensor in left}
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {first}); inplace=True changes the model itself"
        ) from error
