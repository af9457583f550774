"""Running the model backwards over calibration batches: output gradients, and how much each row matters by them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tdc.frontends.program import Tap, fingerprint, is_usable, size_of
from tdc.ir import Site
from tdc.progress import track
from tdc.statistics import (
    Gradients,
    Importance,
    Moments,
    Probe,
    SiteStatistics,
    logits_among,
    without_padding,
)

from .base import Unit
from .propose_layouts import metric_name

__all__ = ["Anchors", "Backwards", "stored_moment"]

_ANCHOR_BYTES = 256 << 20


def stored_moment(sums: Moments, site: Site) -> tuple[Tensor, Tensor]:
    """Moment and mean as the statistics keep them: without the axis of groups for linear sites."""
    mass = sums.mass or sums.rows
    moment, mean = (sums.total / mass).float(), (sums.sum / mass).float()
    return (moment, mean) if site.kind.is_conv else (moment[0], mean[0])


@dataclass
class Backwards:
    """Gathers output gradients batch by batch, until the program says that it cannot."""

    unit: Unit
    gradients: Gradients
    logits: str | None = None
    failed: str = ""
    count: int = 0
    readers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """``site.order`` -> that of all sites that read the same activation."""

    @property
    def wanted(self) -> bool:
        return self.unit.options.metric in ("auto", "fisher") and not self.failed

    def add(self, batch: Any, read: Tap | None = None) -> bool:
        """Whether ``read`` was called with what the sites read, as ``observe`` would."""
        if self.count == 0:
            self.logits = logits_among(self.unit.program.outputs(batch, {}))
            if self.wanted:
                self.readers = _readers(self.unit, batch)
        self.count += 1
        self.gradients.norms.clear()
        if not self.wanted:
            return False
        met: list[int] = []

        def note(site: Site, activation: Tensor) -> None:
            met.append(site.order)
            assert read is not None
            read(site, activation)

        unpadded = self.gradients.unpadded = self.unit.program.unpadded(batch)
        probe = Probe(self.logits, self.unit.options.seed + self.count)

        def loss(outputs: Mapping[str, Tensor]) -> Tensor:
            return probe(without_padding(outputs, unpadded))

        self.failed = self.unit.program.gradients(
            batch, self.unit.sites, loss, self.gradients.tap, None if read is None else note
        )
        return bool(met)

    def of_batch(self) -> dict[int, Tensor]:
        """``site.order`` -> importance of the rows that it reads in the last batch, float32, where it is known."""
        known: dict[tuple[int, ...], Tensor | None] = {}
        for orders in self.readers.values():
            if orders not in known:
                found = None if self.failed else self.gradients.importance(orders)
                known[orders] = None if found is None else found.float()
        given = {order: known[orders] for order, orders in self.readers.items()}
        return {order: weights for order, weights in given.items() if weights is not None}

    def importance(self, site: Site) -> Tensor | None:
        """Of the rows that the site reads in the last batch that was added."""
        return None if self.failed else self.gradients.importance(self.readers.get(site.order, ()))

    def kept(self, entries: Sequence[SiteStatistics]) -> tuple[tuple[SiteStatistics, ...], tuple[Tensor, ...]]:
        """The entries with the places of their gradients, and those; none if it failed on the way."""
        sums = {} if self.failed else {o: s for o, s in self.gradients.sums.items() if s.rows}
        sites = [entry.site for entry in entries if entry.site.order in sums]
        places = {site.order: k for k, site in enumerate(sites)}
        stored = tuple(stored_moment(sums[site.order], site)[0] for site in sites)
        return tuple(replace(entry, gradient=places.get(entry.site.order)) for entry in entries), stored


def _readers(unit: Unit, batch: Any) -> dict[int, tuple[int, ...]]:
    """``site.order`` -> that of all sites that read the same activation in this batch."""
    met: list[tuple[weakref.ref[Tensor], list[int]]] = []

    def tap(site: Site, activation: Tensor) -> None:
        orders = next((orders for ref, orders in met if ref() is activation), None)
        if orders is None:
            met.append((weakref.ref(activation), [site.order]))
        else:
            orders.append(site.order)

    unit.program.observe(batch, unit.sites, tap)
    return {order: tuple(dict.fromkeys(orders)) for _, orders in met for order in orders}


@dataclass
class Anchors:
    """The first batches of the calibration data, up to some size but at least one, each with the importance of its
    rows.
    """

    batches: list[Any] = field(default_factory=list)
    importance: list[Mapping[int, Tensor]] = field(default_factory=list)
    size: int = 0

    def add(self, batch: Any, importance: Mapping[int, Tensor]) -> bool:
        """Whether there is room for more."""
        self.size += size_of(batch)
        if (not self.full or not self.batches) and is_usable(batch):
            self.batches.append(batch)
            self.importance.append(importance)
        return not self.full

    @property
    def full(self) -> bool:
        return self.size > _ANCHOR_BYTES

    @property
    def remark(self) -> str:
        return f"fits and healing take the first {len(self.batches)} calibration batches, {_ANCHOR_BYTES >> 20} MB"

    def read(self, unit: Unit) -> None:
        """The calibration data, for statistics that were gathered before. Batches that they were gathered from are
        known to them.
        """
        gathered = unit.statistics
        assert gathered is not None
        wanted = metric_name(unit) == "fisher" and any(e.important is not None for e in gathered.sites)
        known = gathered.importance_of(unit.sites) if wanted else {}
        backwards = Backwards(unit, Gradients(summed=False))
        batches = unit.program.batches(unit.calibration)
        for batch in track(batches, "weighing rows", show=unit.options.progress and wanted):
            found = known.get(_name(unit, batch)) if known else None
            if found is None and wanted and is_usable(batch):
                backwards.add(batch)
                found = backwards.of_batch()
            if not self.add(batch, found or {}):
                break

    def kept(self, unit: Unit, entries: Sequence[SiteStatistics]) -> tuple[Importance, ...]:
        """The importance as statistics keep it."""
        pairs = zip(self.batches, self.importance, strict=True)
        return tuple(Importance.of(_name(unit, batch), own, entries) for batch, own in pairs if own)


def _name(unit: Unit, batch: Any) -> str:
    return f"{unit.program.door} {fingerprint(batch)}"
