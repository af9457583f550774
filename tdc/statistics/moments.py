"""Second moments of the inputs of sites, gathered while the model runs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir import Site

__all__ = ["Collector", "Moments"]


@dataclass
class Moments:
    """Running sums over activation rows x (i): ``total = sum x x^T`` and ``sum = sum x``, float64."""

    total: Tensor
    sum: Tensor
    rows: int = 0
    dropped: int = 0

    @classmethod
    def zeros(cls, width: int) -> Moments:
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def add(self, activation: Tensor) -> None:
        """Add all rows of (..., i). Products run in float32 (float64 for float64 input) and add up in float64.

        Rows with NaN or infinity are left out and counted in ``dropped``.
        """
        rows = activation.detach().reshape(-1, activation.shape[-1])
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        finite = torch.isfinite(rows).all(1)
        if not bool(finite.all()):
            self.dropped += int((~finite).sum())
            rows = rows[finite]
        self.total += (rows.T @ rows).to("cpu", torch.float64)
        self.sum += rows.sum(0, dtype=torch.float64).cpu()
        self.rows += rows.shape[0]

    def merge(self, other: Moments) -> None:
        """Add what another one has seen."""
        self.total += other.total
        self.sum += other.sum
        self.rows += other.rows
        self.dropped += other.dropped

    def clone(self) -> Moments:
        return Moments(self.total.clone(), self.sum.clone(), self.rows, self.dropped)


@dataclass
class Collector:
    """Gathers :class:`Moments` for sites; sites that have always read the very same activations share one.

    Within a batch every distinct activation (tensor object, unless it was written to in between) is multiplied once.
    Memory: two (i, i) float64 matrices per distinct activation of a batch; those that a layer reads in a loop, and
    that are gone, share one.
    """

    moments: list[Moments] = field(default_factory=list)
    group: dict[int, int] = field(default_factory=dict)
    """``site.order`` -> place in ``moments``."""
    _batch: dict[int, Moments] = field(default_factory=dict)
    _known: dict[int, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)
    _reads: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def tap(self, site: Site, activation: Tensor) -> None:
        """Take in one use's activation (..., i)."""
        version = -1 if activation.is_inference() else activation._version
        place = next((k for k, (ref, v) in self._known.items() if ref() is activation and v == version), None)
        if place is None:
            if site.order in self._reads:
                self._join_gone()
            place = max(self._batch, default=-1) + 1
            fresh = Moments.zeros(activation.shape[-1])
            fresh.add(activation)
            self._batch[place] = fresh
            self._known[place] = (weakref.ref(activation), version)
        self._reads[site.order] = (*self._reads.get(site.order, ()), place)

    def _join_gone(self) -> None:
        """One sum for all activations of this batch that are gone and were read by the same sites."""
        kept: dict[tuple[tuple[int, int], ...], int] = {}
        for place in [k for k, (ref, _) in self._known.items() if ref() is None]:
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
            self.group[key] = together[old, reads]
        self._batch, self._known, self._reads = {}, {}, {}

    def _own(self, old: int, claimed: set[int], like: Moments) -> int:
        """The group's own sums if they are unclaimed and all its sites go on together; else a copy, or new ones."""
        sharers = [key for key, group in self.group.items() if group == old]
        if old >= 0 and old not in claimed and len({self._reads.get(key) for key in sharers}) == 1:
            claimed.add(old)
            return old
        self.moments.append(self.moments[old].clone() if old >= 0 else Moments.zeros(like.total.shape[0]))
        return len(self.moments) - 1
