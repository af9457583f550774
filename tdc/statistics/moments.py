"""Second moments of the inputs of sites, gathered while the model runs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ir import Site
from .patches import input_rows, output_rows, unpadded_rows, window_lengths

__all__ = ["WIDEST", "Collector", "Gradients", "Moments", "gram", "summing"]

WIDEST = 5120
"""Inputs per position (n) of a convolution above which the moment of its outputs is gathered instead: a float32
matrix of 5120 has 105 MB."""
_DOUBLE = 512
"""Width up to which sums are kept in float64; above it in float32, in which products are made and statistics are
stored: that takes half of the memory, and adds up in a third of the time."""
_CLIP = 10.0
_EVEN = 0.1
"""How much of the importance of a row is the same for all."""
_BLOCK = 256


def summing(width: int, dtype: torch.dtype = torch.float64) -> torch.dtype:
    """In which sums of products (width, width) are kept, where ``dtype`` is wanted."""
    return dtype if width <= _DOUBLE else torch.float32


def gram(rows: Tensor, scaled: Tensor) -> Tensor:
    """``sum a x x^T`` (g, n, n) of rows x and ``a x`` (g, m, n): only blocks on and above the diagonal are
    multiplied out.
    """
    width = rows.shape[-1]
    if width < 2 * _BLOCK:
        return rows.mT @ scaled
    found = rows.new_empty((len(rows), width, width))
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for own, left, right in zip(found, rows, scaled, strict=True):
            torch.mm(left[:, start:end].mT, right[:, start:], out=own[start:end, start:])
        found[..., end:, start:end] = found[..., start:end, end:].mT
    return found


@dataclass
class Moments:
    """Running sums over input rows x (g, n): ``total = sum x x^T`` (g, n, n) and ``sum = sum x`` (g, n).

    With ``weight`` (g, o, n), ``total = sum y y^T`` (g, o, o) over ``y = W x`` instead. ``seen`` counts all rows of the
    activations, ``rows`` those that were added: some are left out of large convolutions, and those with NaN or infinity
    are (``dropped``). ``important``: the same sums with each row at its importance a, ``sum a x x^T``, where that was
    given; ``mass`` is ``sum a`` then, and ``square`` is ``sum a^2``. ``half``: the sums over every second batch, in
    float32.
    """

    total: Tensor
    sum: Tensor
    weight: Tensor | None = None
    rows: int = 0
    seen: int = 0
    dropped: int = 0
    mass: float = 0.0
    square: float = 0.0
    important: Moments | None = None
    half: Moments | None = None

    @classmethod
    def zeros(
        cls, groups: int, width: int, weight: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Moments:
        side = width if weight is None else weight.shape[1]
        dtype = summing(side, dtype)
        sums = torch.zeros(groups, width, dtype=torch.float64)
        return cls(torch.zeros(groups, side, side, dtype=dtype), sums, weight)

    def add(self, rows: Tensor, importance: Tensor | None = None) -> None:
        """Add rows (m, g, n), of an importance (m). Products run in float32 (float64 for float64 input) and add up in
        the dtype of the sum.

        Rows with NaN or infinity are left out and counted in ``dropped``.
        """
        rows = rows.detach().to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if not bool(torch.isfinite(rows.sum())):  # of one number first: quicker
            finite = torch.isfinite(rows).flatten(1).all(1)
            self.dropped += int((~finite).sum())
            rows = rows[finite]
            importance = None if importance is None else importance[finite.to(importance.device)]
        self._accumulate(rows, rows)
        if importance is not None:
            if self.important is None:
                self.important = self._empty(self.total.dtype)
            each = importance.to(rows.device, torch.float64)
            self.important.mass += float(each.sum())
            self.important.square += float(each.square().sum())
            self.important._accumulate(rows, rows * each.to(rows)[:, None, None])

    def _accumulate(self, rows: Tensor, scaled: Tensor) -> None:
        self.sum += scaled.sum(0).to("cpu", torch.float64)
        self.rows += rows.shape[0]
        left, right = rows.movedim(1, 0), scaled.movedim(1, 0)
        if self.weight is not None:
            matrix = self.weight.to(left).mT
            left, right = left @ matrix, right @ matrix
        self.total += gram(left, right).to("cpu", self.total.dtype)

    @property
    def effective_rows(self) -> int:
        """``(sum a)^2 / sum a^2``: so many rows of one importance tell as much; without importance the rows."""
        return max(1, round(self.mass**2 / self.square)) if self.square > 0 else self.rows

    def _empty(self, dtype: torch.dtype = torch.float64) -> Moments:
        return Moments.zeros(self.sum.shape[0], self.sum.shape[1], self.weight, dtype)

    def halves(self) -> tuple[Moments, Moments] | None:
        """The sums over every second batch, and over the others; None if there is only one of them."""
        if self.half is None or not 0 < self.half.rows < self.rows:
            return None
        rest = self._empty()
        rest.total, rest.sum = self.total - self.half.total, self.sum - self.half.sum
        rest.rows = self.rows - self.half.rows
        return self.half, rest

    def merge(self, other: Moments) -> None:
        """Add what another one has seen."""
        self.total += other.total
        self.sum += other.sum
        self.rows += other.rows
        self.seen += other.seen
        self.dropped += other.dropped
        self.mass += other.mass
        self.square += other.square
        if other.important is not None:
            if self.important is None:
                self.important = self._empty()
            self.important.merge(other.important)
        if other.half is not None:
            self.merge_half(other.half)

    def merge_half(self, other: Moments) -> None:
        """Add to the half what another one has seen."""
        if self.half is None:
            self.half = self._empty(torch.float32)
        self.half.merge(replace(other, important=None, half=None))

    def clone(self) -> Moments:
        copy = self._empty()
        copy.merge(self)
        return copy


@dataclass
class Collector:
    """Gathers :class:`Moments` for sites; sites that have always read the very same activations share one.

    Convolutions share one only if their windows and groups agree too. A convolution of more than ``WIDEST`` inputs per
    position gets the moment of its outputs, by ``weight(site)``.

    Within a batch every distinct activation (tensor object, unless it was written to in between) is multiplied once.
    Memory: three (g, n, n) matrices per distinct activation, of all batches (float64 up to n = 512, float32 above), of
    every second one and of the one that runs (float32); those that a layer reads in a loop, and that are gone, share
    one. ``importance(site)``: of the rows that the site reads in this
    batch, in their order, or None; two more then. ``unpadded`` (examples, positions): what is not padding in this
    batch; the other rows of linear sites are left out.
    """

    weight: Callable[[Site], Tensor] | None = None
    importance: Callable[[Site], Tensor | None] = lambda site: None
    unpadded: Tensor | None = None
    padding: int = 0
    """Positions of all batches that are padding."""
    moments: list[Moments] = field(default_factory=list)
    group: dict[int, int] = field(default_factory=dict)
    """``site.order`` -> place in ``moments``."""
    lengths: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """``site.order`` -> window axis -> (entries of the input, positions), summed over all uses."""
    _count: int = 0
    _ended: int = 0
    _batch: dict[int, Moments] = field(default_factory=dict)
    _known: dict[int, tuple[weakref.ref[Tensor], int, object]] = field(default_factory=dict)
    _reads: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def begin_batch(self, unpadded: Tensor | None) -> None:
        """To be called before a batch with padding, with what is none."""
        self.unpadded = unpadded
        self.padding += 0 if unpadded is None else int((~unpadded).sum())

    def tap(self, site: Site, activation: Tensor) -> None:
        """Take in one use's activation: (..., i), or (examples, channels, window axes...)."""
        version = -1 if activation.is_inference() else activation._version
        form = self._form(site)
        known = self._known.items()
        place = next((k for k, (ref, v, f) in known if ref() is activation and v == version and f == form), None)
        if place is None:
            if site.order in self._reads:
                self._join_gone()
            place = max(self._batch, default=-1) + 1
            self._batch[place] = self._sums(site, activation)
            self._known[place] = (weakref.ref(activation), version, form)
        self._reads[site.order] = (*self._reads.get(site.order, ()), place)
        for axis, length, positions in window_lengths(site, activation):
            before = self.lengths.setdefault(site.order, {}).get(axis, (0, 0))
            self.lengths[site.order][axis] = (before[0] + length, before[1] + positions)

    def is_wide(self, site: Site) -> bool:
        """Whether the moment of the site's outputs is gathered in place of that of its inputs."""
        return site.kind.is_conv and site.matrix[2] > WIDEST and self.weight is not None

    def _form(self, site: Site) -> object:
        """Sites of one form turn the same activation into the same rows."""
        if not site.kind.is_conv:
            return ""
        return (site.windows, site.matrix[0], site.matrix[2], site.order if self.is_wide(site) else -1)

    def _sums(self, site: Site, activation: Tensor) -> Moments:
        groups, outputs, width = site.matrix
        weight = None
        if self.is_wide(site):
            assert self.weight is not None
            weight = self.weight(site).reshape(groups, outputs, width)
        exact = torch.float64 if activation.dtype == torch.float64 else torch.float32
        sums = Moments.zeros(groups, width, weight, exact)
        self._count += 1
        importance = self.importance(site)
        for rows, places in input_rows(site, activation, self._count, self.unpadded):
            sums.add(rows, None if importance is None else importance[places])
        lengths = window_lengths(site, activation)
        positions = math.prod(count for _, _, count in lengths)
        batched = activation.ndim == len(lengths) + 2
        examples = activation.shape[0] if batched else 1
        sums.seen = positions * examples if lengths else activation.shape[:-1].numel()
        return sums

    def _join_gone(self) -> None:
        """One sum for all activations of this batch that are gone and were read by the same sites."""
        kept: dict[tuple[tuple[int, int], ...], int] = {}
        for place in [k for k, (ref, *_) in self._known.items() if ref() is None]:
            readers = tuple((key, reads.count(place)) for key, reads in self._reads.items() if place in reads)
            first = kept.setdefault(readers, place)
            if first != place:
                self._batch[first].merge(self._batch.pop(place))
                del self._known[place]
                self._reads = {key: tuple(p for p in reads if p != place) for key, reads in self._reads.items()}

    def end_batch(self) -> None:
        """To be called after each batch: add its sums, and part sites that read different activations this time."""
        together: dict[tuple[int, tuple[int, ...]], int] = {}
        claimed: set[int] = set()
        for key, reads in self._reads.items():
            old = self.group.get(key, -1)
            if (old, reads) not in together:
                together[old, reads] = self._own(old, claimed, self._batch[reads[0]])
                for place in reads:
                    self.moments[together[old, reads]].merge(self._batch[place])
                    if self._ended % 2:
                        self.moments[together[old, reads]].merge_half(self._batch[place])
            self.group[key] = together[old, reads]
        self._batch, self._known, self._reads, self.unpadded = {}, {}, {}, None
        self._ended += 1

    def _own(self, old: int, claimed: set[int], like: Moments) -> int:
        """The group's own sums if they are unclaimed and all its sites go on together; else a copy, or new ones."""
        sharers = [key for key, group in self.group.items() if group == old]
        if old >= 0 and old not in claimed and len({self._reads.get(key) for key in sharers}) == 1:
            claimed.add(old)
            return old
        self.moments.append(self.moments[old].clone() if old >= 0 else like._empty())
        return len(self.moments) - 1


@dataclass
class Gradients:
    """Gathers ``sum g g^T`` over the gradients g of the loss in the outputs of sites: one (g, o, o) for each.

    A row's gradient is clipped to ten times the mean norm of its batch, since few tokens have by far the largest ones.
    Nothing is kept of sites of more than ``WIDEST`` outputs, and of none where not ``summed``. ``norms``: for each site
    and use in this batch ``||g||^2`` by row, NaN for padding (of linear sites, by ``unpadded``).
    """

    sums: dict[int, Moments] = field(default_factory=dict)
    """By ``site.order``."""
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    summed: bool = True
    unpadded: Tensor | None = None

    def tap(self, site: Site, gradient: Tensor) -> None:
        """Take in one use's gradient: (..., o), or (examples, channels, window axes...)."""
        groups, outputs, _ = site.matrix
        rows = output_rows(site, gradient.detach())
        norm = rows.flatten(1).norm(dim=1)
        real = unpadded_rows(site, gradient, self.unpadded)
        if real is not None:
            real = real.to(norm.device)
            norm = norm.masked_fill(~real, torch.nan)
        self.norms.setdefault(site.order, []).append(norm.square().double().cpu())
        if outputs > WIDEST or not self.summed:
            return
        if real is not None:
            rows, norm = rows[real], norm[real]
        limit = _CLIP * norm[torch.isfinite(norm)].mean()
        rows = rows * (limit / norm.clamp(min=limit.clamp(min=torch.finfo(norm.dtype).tiny)))[:, None, None]
        self.sums.setdefault(site.order, Moments.zeros(groups, outputs)).add(rows)

    def importance(self, sites: Iterable[int]) -> Tensor | None:
        """How much an error at each row of this batch matters to the sites that read it: ``||g||^2`` over all of their
        outputs, as a fraction of its mean, at most ten; and a tenth of one for all rows but padding, which gets 0. None
        where it is not known, or one of them is used several times.
        """
        found = [self.norms.get(order, []) for order in sites]
        if not found or any(len(norms) != 1 or norms[0].shape != found[0][0].shape for norms in found):
            return None
        norm = torch.stack([norms[0] for norms in found]).sum(0).nan_to_num(nan=torch.nan, posinf=0.0)
        mean = norm.nanmean()
        if not float(mean) > 0:
            return None
        return ((norm / mean).clamp(max=_CLIP) * (1 - _EVEN) + _EVEN).nan_to_num(nan=0.0)
