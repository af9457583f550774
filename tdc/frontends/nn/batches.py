"""Batches for modules: what users pass, as positional and keyword arguments of ``forward``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import CalibrationError
from ..graph import floating_outputs
from ..program import cut, unpadded_of

__all__ = [
    "Call",
    "answer",
    "as_call",
    "as_calls",
    "blended",
    "copied",
    "in_parts",
    "named",
    "outputs_of",
    "runs_by_example",
    "unpadded_in",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(model: nn.Module, batch: Any, positional: int | None = None) -> Call:
    """One batch as ``(args, kwargs)`` on the model's device.

    A tensor is one argument, a mapping keyword arguments, a tuple or list positional arguments; of the last, those
    beyond what ``forward`` takes (or beyond ``positional``) are dropped, so the labels of a data loader do no harm.
    Raises CalibrationError.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch[: _positional(model) if positional is None else positional])
    else:
        raise CalibrationError(f"a batch must be a tensor, a tuple or a dict of keywords; got {type(batch).__name__}")
    if not args and not kwargs:
        raise CalibrationError("a batch is empty")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(move(a) for a in args), {key: move(value) for key, value in kwargs.items()}


def as_calls(model: nn.Module, calibration: Any, positional: int | None = None) -> Iterator[Call]:
    """All batches of ``calibration``; a single tensor or mapping counts as one batch."""
    if isinstance(calibration, (Tensor, Mapping)):
        calibration = [calibration]
    if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration must be an iterable of batches (a list, a DataLoader); got {type(calibration).__name__}"
        )
    for batch in calibration:
        yield as_call(model, batch, positional)


def named(model: nn.Module, batch: Call) -> dict[str, Any]:
    """The arguments by the names that ``forward`` gives them; those that it gives none are left out."""
    args, kwargs = batch
    return dict(zip(_places(model) if args else (), args, strict=False)) | kwargs


def _positional(model: nn.Module) -> int | None:
    """How many positional arguments ``forward`` takes; None for any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return len(_places(model))


def _places(model: nn.Module) -> list[str]:
    """Names of the arguments that ``forward`` takes by their places."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def unpadded_in(model: nn.Module, call: Call) -> Tensor | None:
    """:func:`unpadded_of` for a module's inputs; None for encoders with a decoder, whose positions are others."""
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return None if two is True else unpadded_of(named(model, call))


def in_parts(call: Call, examples: int) -> Iterator[Call]:
    """The batch in pieces along its first axis, where all its tensors have the same length there."""
    lengths = _lengths(call)
    if len(lengths) != 1 or max(lengths) <= examples:
        yield call
        return
    for start in range(0, max(lengths), examples):
        yield cut(call, slice(start, start + examples))


def _lengths(batch: Any) -> set[int]:
    """Of the first axes of all tensors and arrays of a batch."""
    if isinstance(batch, Mapping):
        return _lengths(tuple(batch.values()))
    if isinstance(batch, (tuple, list)):
        return set[int]().union(*map(_lengths, batch))
    return {len(batch)} if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim else set()


def copied(call: Call) -> Call:
    """A copy of the tensors of a batch, and of objects such as caches, which a forward may change."""
    new: Call = tree_map(_copy_of, call)
    return new


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except Exception:  # it cannot be copied: it is handed on as it is
        return value


def answer(model: nn.Module, call: Call) -> Any:
    """What the model gives for a batch, which its forward may change. Raises CalibrationError."""
    args, kwargs = call
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise CalibrationError(f"the model cannot run on a batch: {type(error).__name__}: {error}") from error


def outputs_of(model: nn.Module, call: Call, seed: int = 0) -> dict[str, Tensor]:
    """A model's floating outputs by name, of a copy of the batch, with the same random numbers each time."""
    torch.manual_seed(seed)
    return floating_outputs(answer(model, copied(call)))


def runs_by_example(model: nn.Module, call: Call, examples: int) -> bool:
    """Whether the first axis of a batch counts examples: the first so many of them give as many outputs.
    Raises CalibrationError where the model cannot run on the batch.
    """
    part = next(in_parts(call, examples))
    try:
        outputs = [v for v in outputs_of(model, part).values() if v.ndim]
    except CalibrationError:
        outputs_of(model, call)  # what cannot run as a whole, either, is an error
        return False
    lengths = _lengths(part)
    return len(lengths) == 1 and bool(outputs) and all({len(v)} == lengths for v in outputs)


def blended(call: Call, generator: torch.Generator) -> Call | None:
    """Each example ``a x + (1 - a) x'`` with another one of the batch, ``a`` uniform in [0, 1]; None where an input is
    not floating point (token ids, masks), or there is one example only.
    """
    args, kwargs = call
    values = [*args, *kwargs.values()]
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim]
    plain = all(isinstance(v, Tensor | bool | int | float | str | None) for v in values)
    lengths = {len(v) for v in tensors}
    if not plain or len(lengths) != 1 or min(lengths) < 2 or not all(v.is_floating_point() for v in tensors):
        return None
    count = min(lengths)
    part, order = torch.rand(count, generator=generator), torch.randperm(count, generator=generator)

    def blend(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        share = part.to(value).reshape(-1, *[1] * (value.ndim - 1))
        return share * value + (1 - share) * value[order.to(value.device)]

    return tuple(blend(v) for v in args), {key: blend(v) for key, v in kwargs.items()}
