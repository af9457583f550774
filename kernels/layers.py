"""Kernels for the layers of a model, each where it is measured to be faster than the stock operators."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tdc.errors import OptionError
from tdc.ir import Block, Decline, Remark

from .base import Match
from .dense import KernelLinear, can_use_kernels
from .measure import COLD, GAIN, memory_format, timed
from .quick import PLAIN, Quick, watched
from .registry import match

__all__ = ["Accelerated", "Runs", "accelerate", "measured"]

STAGE = "kernels"
_MANY, _SURE = 256, 1.2
"""From that many rows on it is arithmetic that counts, and a kernel with that gain is taken for still more rows."""


Runner = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor | None]


@runtime_checkable
class Runs(Protocol):
    """A layer that runs a block, and that can be told another way to run it."""

    bias: Tensor | None

    @property
    def own(self) -> Block:
        """The block that it computes by itself, with nobody else."""
        ...

    @property
    def shared(self) -> Block | None:
        """What it computes alike with others, once for all of them; without bias."""
        ...

    @property
    def factors(self) -> Mapping[str, Tensor]: ...

    def use(self, run: Runner | None, shared: Runner | None = None) -> None:
        """Ask ``run(input, factors, bias)`` first for its own block, and run it where it gives None; the same for what
        it shares.
        """
        ...


@dataclass(frozen=True)
class Accelerated:
    """Runs a block by its kernel where that was measured to be faster, gives None elsewhere.

    ``rows``: ranges of the number of rows, ``shapes`` of what a convolution is given, ``threads``: of torch, for which
    it was. Elsewhere: where gradients are needed, while a compiler traces, under autocast, for another dtype or device.
    """

    match: Match
    rows: tuple[range, ...]
    threads: int
    shapes: frozenset[tuple[int, ...]] = frozenset()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling() or watched() or not self._measured(x):
            return None
        operands = (x, *factors.values()) if bias is None else (x, *factors.values(), bias)
        if torch.is_autocast_enabled(self.device) or not _suits(operands, self.device, self.dtype):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            return None
        if self.device == "cpu" and torch.get_num_threads() != self.threads:
            return None
        result: Tensor = self.match.run(x, factors, bias)
        return result

    def quick(self, places: Mapping[str, tuple[Mapping[str, Any], str]], bias: Mapping[str, Any]) -> Quick | None:
        """The same for one layer, with less to look at, after it has run there; None where there is no such way.

        ``places``: of the factors by name, a dict of tensors and a key; ``bias``: the dict with "bias".
        """
        if self.match.kernel.prepare is None or self.shapes:
            return None
        names = self.match.factors
        if "bias" not in bias or not all(name in places for name in names):
            return None
        found = [*(places[name] for name in names), (bias, "bias")]
        plain = all(t is None or t.is_contiguous() for t in (own[key] for own, key in found))
        return Quick(self, found) if plain else None

    def _measured(self, x: Tensor) -> bool:
        if x.layout is not torch.strided or x.is_nested:
            return False
        if self.shapes:
            return tuple(x.shape) in self.shapes and x.is_contiguous(memory_format=memory_format(self.device))
        if not x.ndim or x.shape[-1] != self._inputs:
            return False
        rows = x.numel() // self._inputs
        return bool([span for span in self.rows if rows in span])

    @cached_property
    def _inputs(self) -> int:
        return dict(self.match.sizes)["i"]


@dataclass(frozen=True)
class OnDevice:
    """One choice for calls, another one while a CUDA graph is captured: there a call costs no time of the processor."""

    called: Accelerated | None
    captured: Accelerated | None

    def __call__(self, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor | None:
        chosen = self.captured if torch.cuda.is_current_stream_capturing() else self.called
        return None if chosen is None else chosen(x, factors, bias)


def accelerate(
    model: nn.Module, rows: Iterable[int] = (1, 4, 16, 64, 256), example: Any = None, *, dense: bool = True
) -> tuple[Remark, ...]:
    """Let the factored layers of ``model``, and if ``dense`` its layers of the class ``nn.Linear`` too, run on kernels,
    each for the inputs for which its kernel is measured to be faster here and now, with torch's present number of
    threads; all else runs as before. On a GPU calls from Python and those that are captured into a CUDA graph are
    measured by themselves.

    ``example``: an input of the model, a tuple of its arguments or a dict of them by name, or a list of such. The model
    runs on each once, in evaluation, and each layer is measured at exactly the shapes that it is given. Without it
    linear layers are measured at ``rows``, each of which stands for the numbers of rows between the one before and
    itself, and the last one, if it is 256 or more, on the processor for all above it too where the gain is a fifth;
    convolutions stay.

    Layers of one shape are measured once. Returns a remark for each layer: what was measured, or why it stays. Results
    are within rounding of the stock operators'; since the choice is measured, two runs can differ by that. The model is
    changed in place. Deep copies keep the kernels of factored layers and leave those of dense ones behind; files
    keep none. ``accelerate(model, ())`` takes them away.
    """
    steps = sorted({int(n) for n in rows})
    if steps and steps[0] < 1:
        raise OptionError(f"rows are numbers above 0; got {steps[0]}")
    layers = _layers(model, dense)
    try:
        return _accelerated(model, layers, steps, example)
    except BaseException:
        for _, layer in layers:
            layer.use(None)
        raise


def _accelerated(
    model: nn.Module, layers: list[tuple[str, Runs]], steps: list[int], example: Any
) -> tuple[Remark, ...]:
    seen = None if example is None else _seen(model, [layer for _, layer in layers], example)
    cold, known = min(COLD, _bytes(model)), dict[Any, float]()
    remarks = []
    for place, (name, layer) in enumerate(layers):
        parts: dict[str, Block | None] = {"": layer.own, "what it shares: ": layer.shared}
        found = {
            note: _chosen(layer, block, steps, None if seen is None else seen[place], known, cold)
            for note, block in parts.items()
            if block is not None
        }
        layer.use(*(found[note][0] if note in found else None for note in parts))
        remarks.append(Remark(name, STAGE, "; ".join(note + text for note, (_, text) in found.items())))
    return tuple(remarks)


def _layers(model: nn.Module, dense: bool) -> list[tuple[str, Runs]]:
    """Those that can run on kernels, none of them on one."""
    for layer in model.modules():
        if isinstance(layer, Runs):
            layer.use(None)
        if dense and can_use_kernels(layer):
            layer.__class__ = KernelLinear
        if type(layer) is KernelLinear:
            layer.use(_stock)
    modules = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Runs)]
    return [(n, m) for n, m in modules if not isinstance(m, KernelLinear) or type(m) is KernelLinear]  # parametrized


def _stock(x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
    """No other way."""


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _devices(model: nn.Module) -> list[int]:
    found = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    return sorted(found)


Shapes = tuple[tuple[int, ...], ...]


def _seen(model: nn.Module, layers: list[Runs], example: Any) -> list[Shapes]:
    """The shapes of what each layer's own block is given when the model runs, of images in the kernels' format."""
    found: list[dict[tuple[int, ...], None]] = [{} for _ in layers]
    modes = [(module, module.training) for module in model.modules()]

    def noted(layer: Runs, shapes: dict[tuple[int, ...], None]) -> Runner:
        def note(x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
            if not layer.own.kind.is_conv or x.is_contiguous(memory_format=memory_format(x.device.type)):
                shapes.setdefault(tuple(x.shape))

        return note

    try:
        model.eval()
        for layer, shapes in zip(layers, found, strict=True):
            layer.use(noted(layer, shapes))
        with torch.no_grad(), torch.random.fork_rng(_devices(model)):
            for one in example if isinstance(example, list) else [example]:
                if isinstance(one, Mapping):
                    model(**one)
                else:
                    model(*one) if isinstance(one, tuple) else model(one)
    finally:
        for module, training in modes:
            module.training = training
    return [tuple(shapes) for shapes in found]


def _chosen(
    layer: Runs, block: Block, steps: list[int], seen: Shapes | None, known: dict[Any, float], cold: int
) -> tuple[Runner | None, str]:
    """The kernel for a block of the layer where it gains, and what is to be said. ``seen``: shapes of the layer's own
    input; what it shares has as many rows. ``cold``: see :func:`.measure.timed`.
    """
    factors = layer.factors
    some = next((factor for factor in factors.values() if factor.is_floating_point()), torch.empty(0))
    found = match(block, some.device.type)
    bias = layer.bias if block.output == layer.own.output else None
    if isinstance(found, Decline):
        return None, found.reason
    name, fits = found.kernel.name, str(some.dtype).removeprefix("torch.") in found.kernel.dtypes
    if not fits or not _suits((factors[factor] for factor in found.factors), some.device.type, some.dtype):
        return None, f"{name}: {found.kernel.limits}"
    if block.kind.is_conv and seen is None:
        return None, f"{name}: measured at the shapes of an example input, and there is none"
    if block.kind.is_conv and not seen:
        return None, f"{name}: not used, the example gives it no images in the memory format that it takes"
    shapes = seen if block.kind.is_conv else _flat(found, steps if seen is None else [_rows(s) for s in seen])
    ways = [measured] if found.kernel.device == "cpu" else [measured, measured_captured]
    chosen, texts = [], []
    for way in ways:
        gains = {}
        for shape in shapes or ():
            key = (name, found.sizes, found.windows, bias is None, shape, some.device, some.dtype, way)
            if key not in known:
                known[key] = way(found, factors, bias, shape, cold=cold)
            gains[shape] = known[key]
        chosen.append(_where(found, gains, None if seen is not None else steps, some))
        texts.append(", ".join(f"{gain:.2f} times as fast {_at(shape)}" for shape, gain in gains.items()))
    text = "; in a CUDA graph ".join(texts) if any(texts) else "nothing measured"
    if not any(chosen):
        return None, f"{name}: not used, {text}"
    return chosen[0] if len(chosen) == 1 else OnDevice(*chosen), f"{name}: {text}"


def _where(
    found: Match, gains: Mapping[tuple[int, ...], float], steps: list[int] | None, some: Tensor
) -> Accelerated | None:
    """The kernel for those of the inputs for which it gains: with ``steps`` of rows for those between them too."""
    fast = [shape for shape, gain in gains.items() if gain > GAIN]
    if not fast:
        return None
    threads, place = torch.get_num_threads(), (some.device.type, some.dtype)
    if found.kernel.kind.is_conv:
        return Accelerated(found, (), threads, frozenset(fast), *place)
    befores = [0, *steps] if steps is not None else [shape[0] - 1 for shape in gains]
    pairs = zip(gains, befores, strict=False)
    spans = [range(before + 1, shape[0] + 1) for shape, before in pairs if shape in fast]
    most = max(gains)
    if steps is not None and some.is_cpu and most[0] >= _MANY and gains[most] > _SURE:
        spans.append(range(most[0] + 1, sys.maxsize))
    return Accelerated(found, tuple(spans), threads, frozenset(), *place)


def _flat(found: Match, rows: Iterable[int]) -> Shapes:
    return tuple((n, dict(found.sizes)["i"]) for n in sorted(set(rows)))


def _rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _at(shape: tuple[int, ...]) -> str:
    return f"at {shape[0]} rows" if len(shape) == 2 else f"at {' x '.join(map(str, shape))}"


def measured(
    found: Match, factors: Mapping[str, Tensor], bias: Tensor | None, shape: Sequence[int], *, cold: int = COLD
) -> float:
    """How many times as fast as the stock operators the kernel is on an input of that shape, asked as layers ask it."""
    return timed(found, factors, bias, shape, run=_always(found, factors, shape), cold=cold).gain


def _always(found: Match, factors: Mapping[str, Tensor], shape: Sequence[int]) -> Accelerated | None:
    some = next(factor for factor in factors.values() if factor.is_floating_point())
    return _where(found, {tuple(shape): math.inf}, None, some)


def measured_captured(
    found: Match, factors: Mapping[str, Tensor], bias: Tensor | None, shape: Sequence[int], *, cold: int = COLD
) -> float:
    """The same in a CUDA graph."""
    return timed(found, factors, bias, shape, captured=True).gain


def _suits(operands: Iterable[Tensor], device: str, dtype: torch.dtype) -> bool:
    """Whether all are plain tensors there, of that type or int32."""
    for t in operands:
        if type(t) not in PLAIN or not (t.is_cpu if device == "cpu" else t.device.type == device):
            return False
        if (t.dtype is not dtype and t.dtype is not torch.int32) or t.layout is not torch.strided or t.is_neg():
            return False
    return True
