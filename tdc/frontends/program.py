"""What every frontend offers to the passes, and the sketch by which all of them recognise a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ir import Block, Cost, Remark, Site

__all__ = [
    "Change",
    "Kernel",
    "Loss",
    "Program",
    "Replacement",
    "Stopwatch",
    "Tap",
    "cut",
    "fingerprint",
    "head",
    "is_usable",
    "passed_over_weight",
    "size_of",
    "sketch",
    "unpadded_of",
]

Tap = Callable[[Site, Tensor], None]
"""Called with a site and the activation that enters it: any leading axes and the site's input axis last; for
convolutions (examples, channels, window axes...), before the padding that the site's windows state."""

Loss = Callable[[Mapping[str, Tensor]], Tensor]
"""Of the floating outputs by name: what is run backwards from."""

Kernel = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor | None]
"""Runs a block: takes its input, its factors and the bias, gives None where it cannot."""

_ENTRIES = 8
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Replacement:
    """What takes the place of a site: its block, the factors in the dtype in which they are stored, and their origin.

    ``output_order``: entry k of the output that the block gives is entry ``output_order[k]`` of the dense one, and
    the site that reads it expects that; a bias between the two must be put in that order. None: the dense order.
    ``shift``: to be added to the site's bias (one number per output, in the dense order), None for nothing.
    ``shared``: factors that are those of the site ``lead`` (by order) too, under the same names; what follows from
    them and the input is computed once.
    """

    block: Block
    factors: Mapping[str, Tensor]
    decomposition: str
    output_order: Tensor | None = None
    shift: Tensor | None = None
    lead: int | None = None
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Change:
    """Another weight for a site, in canonical axes, and what is added to its bias (one number per output)."""

    weight: Tensor
    shift: Tensor | None = None


class Stopwatch(Protocol):
    """Times of one run of a model, in seconds."""

    def model(self) -> tuple[float, float]:
        """Of the whole model, and what part of that is spent in the sites."""

    def key(self, site: Site) -> object:
        """Equal for sites that take the same time."""

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[Kernel | None] = ()) -> list[float]:
        """All uses of a site together, as it is and with each of the blocks in place of it. ``kernels``: of each block,
        what else can run it; where this door can use that, and it is faster, that is the time.
        """


class Program(Protocol):
    """A model opened by one door. Everything but :meth:`replace` and :meth:`finish` leaves the model as it is."""

    door: str

    def sites(self) -> tuple[tuple[Site, ...], tuple[Remark, ...]]:
        """All sites in topological order, tied uses merged into one, and why other weights were passed over."""

    def weight(self, site: Site) -> Tensor:
        """The dense weight in canonical axes, on the CPU, in its own dtype; not to be written to.

        A normalisation behind the site (``site.norm``) is folded into it.
        """

    def gain(self, site: Site) -> Tensor | None:
        """The gain (i) that a normalisation in front of a linear site multiplies its input with, if there is one.

        What comes from the normalisation before it has mean square one in every entry, so ``W diag(gain)`` is the
        weight to be judged where no data is.
        """

    def batches(self, calibration: Any) -> Iterator[Any]:
        """The user's calibration data as batches that :meth:`observe` and :meth:`outputs` take.

        Raises CalibrationError for data of a wrong type.
        """

    def unpadded(self, batch: Any) -> Tensor | None:
        """Which positions (examples, positions) of a batch are not padding (:func:`unpadded_of`)."""

    def observe(self, batch: Any, sites: Iterable[Site], tap: Tap) -> None:
        """Run the dense model on one batch and hand every use's input activation to ``tap``.

        The same activation that enters several sites is handed over as the same tensor object. Raises
        CalibrationError if the model cannot run on the batch.
        """

    def gradients(self, batch: Any, sites: Iterable[Site], loss: Loss, tap: Tap, read: Tap | None = None) -> str:
        """Run the dense model on one batch forwards and backwards, and hand the gradient of ``loss(outputs)`` in every
        use's output to ``tap``, that behind the normalisation where one is folded into the site.

        Afterwards ``read`` is called for every use, as :meth:`observe` would, where the program has kept what the sites
        read; for none where it has not.

        Returns why it cannot be done; '' where it was.
        """

    def lockstep(self, batches: Sequence[Any], sites: Iterable[Site], visit: Any) -> str:
        """Run every batch twice side by side, with the dense model and with one that changes on the way.

        ``visit(site, activations, beside)`` is called at each site with those of all dense runs and then those of all
        changing ones; the change that it returns holds in the latter from this use on (None: the site as it is). Of the
        activations, those of convolutions are before the padding that the windows state. ``beside``: the tensors that
        the outputs of the site will be added to, and that alone is done with them (residual connections), None where
        there is none, or it is not known yet. Returns why it cannot be done, or was given up; '' where it was done. See
        :mod:`.lockstep`.
        """

    def outputs(self, batch: Any, changes: Mapping[int, Change]) -> dict[str, Tensor]:
        """Floating outputs by name, with the weights of some sites (by ``site.order``) replaced for this run."""

    def remembering(self, batches: Sequence[Any]) -> AbstractContextManager[None]:
        """Inside, :meth:`outputs` of these batches (the very objects) need not run again what comes before the first
        change, where the door can have that.
        """

    def cost(self, batch: Any = None) -> Cost:
        """Of the whole model: parameters, bytes, and multiply-adds and peak of the activations of one run on the
        batch, by default the example (0 if not counted).
        """

    def stopwatch(self, sites: Iterable[Site], batch: Any = None) -> Stopwatch | str:
        """What times the model and these sites on a batch, by default the example, as it runs on this machine; or why
        that cannot be had.
        """

    def declines(self, site: Site, block: Block) -> str | None:
        """Why this door cannot write a block in place of the site; None if it can."""

    def replace(self, site: Site, new: Replacement) -> None:
        """Note that all uses of ``site`` are to be replaced."""

    def forget(self) -> None:
        """Drop all noted replacements."""

    def finish(self) -> Any:
        """Cut all noted replacements in, all or none, and give back the new model."""


def sketch(weight: Tensor) -> tuple[float, ...]:
    """Eight numbers that recognise a weight (o, i), of a convolution (g o, i k), after its rows were scaled (a folded
    norm) or it was stored transposed.

    With ``S[o, i] = W[o, i]^2 / sum_i W[o, i]^2`` and fixed pseudo-random signs a_k, b_k, entry k is
    ``a_k^T S b_k / sqrt(3 o / i)``, of order one for a Gaussian weight. Rounded to six decimals. () if the weight is
    empty or not finite.
    """
    weight = weight.flatten(1)
    rows, columns = weight.shape
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        return ()
    a, b = _signs(rows, 0), _signs(columns, 1)
    total = torch.zeros(_ENTRIES, dtype=torch.float64)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].double()
        part = part / part.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        square = part.square_()
        square = square / square.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        total += (a[start : start + step] * (square @ b)).sum(0)
    scaled = total / (3 * rows / columns) ** 0.5
    return tuple(round(float(x), 6) + 0.0 for x in scaled)


def _signs(length: int, stream: int) -> Tensor:
    """(length, entries) of +1 and -1 from the splitmix64 sequence: the same on every machine."""
    count = np.arange(1, length * _ENTRIES + 1, dtype=np.uint64) + np.uint64(stream << 40)
    z = count * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = ((z ^ (z >> np.uint64(31))) >> np.uint64(63)).astype(np.float64)
    return torch.from_numpy(bits * 2 - 1).reshape(length, _ENTRIES)


def passed_over_weight(weight: Tensor) -> str:
    """Why a weight cannot be decomposed ('' if it can): zero size, a dtype that is not real floating, NaN or
    infinity.
    """
    if weight.numel() == 0:
        return f"the weight of shape {list(weight.shape)} has no entries"
    if not weight.is_floating_point():
        return f"the weight has dtype {str(weight.dtype).removeprefix('torch.')}, not a real floating one"
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        return f"{bad} of {weight.numel()} entries of the weight are NaN or infinite"
    return ""


def is_usable(batch: Any) -> bool:
    """Whether every tensor and array of a batch has entries, all of them finite."""
    if isinstance(batch, Mapping):
        return all(is_usable(value) for value in batch.values())
    if isinstance(batch, (tuple, list)):
        return all(is_usable(value) for value in batch)
    if isinstance(batch, np.ndarray):
        return batch.size > 0 and (batch.dtype.kind not in "fc" or bool(np.isfinite(batch).all()))
    if isinstance(batch, Tensor):
        return batch.numel() > 0 and bool(torch.isfinite(batch).all())
    return True


def unpadded_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which positions are not padding, bool (examples, positions), by the input ``attention_mask`` where it has these
    axes and is 0 there and 1 elsewhere; None where there is no such input, or no padding, or nothing else, and for
    models with a decoder, whose positions are others.
    """
    mask = None if any(name.startswith("decoder_") for name in inputs) else inputs.get("attention_mask")
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = mask.detach().cpu()
    real = mask == 1
    return real if bool((real | (mask == 0)).all()) and 0 < int(real.sum()) < real.numel() else None


def size_of(batch: Any) -> int:
    """Bytes of all tensors and arrays of a batch."""
    if isinstance(batch, Mapping):
        return sum(size_of(value) for value in batch.values())
    if isinstance(batch, (tuple, list)):
        return sum(size_of(value) for value in batch)
    return int(batch.nbytes) if isinstance(batch, (Tensor, np.ndarray)) else 0


def fingerprint(batch: Any) -> str:
    """SHA-256 over the content of all tensors and arrays of a batch, and how it is put together."""
    state = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.items())
        if isinstance(value, (tuple, list)):
            state.update(f"{len(value)} of".encode())
            for part in value:
                take(part)
        elif isinstance(value, (Tensor, np.ndarray)):
            state.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            state.update(np.ascontiguousarray(value).tobytes())
        else:
            state.update(repr(value).encode())

    take(batch)
    return state.hexdigest()


def cut(batch: Any, part: slice) -> Any:
    """A part of the leading axis of every tensor or array in a batch (dicts, tuples, lists)."""
    if isinstance(batch, Mapping):
        return {key: cut(value, part) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(cut(value, part) for value in batch)
    return batch[part] if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim > 0 else batch


def head(batch: Any, examples: int) -> Any:
    """The first ``examples`` entries along that axis."""
    return cut(batch, slice(examples))
