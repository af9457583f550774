"""Reports: what was done to every site, what it cost before and after, and why other weights stayed as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .errors import ModelError
from .ir import Cost, Plan, Remark
from .ir.text import format_count, format_table

__all__ = ["Report", "SiteReport"]

_FORMAT = "tdc-report"


@dataclass(frozen=True)
class SiteReport:
    """One site. Errors are relative squared errors of the stored factors: planned and measured in the metric, and of
    the weight.

    ``execution``: see :class:`tdc.ir.Candidate`. ``cancellation``: see :func:`tdc.decompositions.cancellation`.

    ``before`` and ``after``: params, bytes, multiply-adds and peak bytes of activations, the last two of the site in a
    calibration batch (per activation row, or example, where there was none).
    """

    name: str
    layer: str
    decomposition: str
    variant: str
    ranks: Mapping[str, int]
    planned_error: float
    error: float
    weight_error: float
    before: Cost
    after: Cost
    folded: bool = False
    """Its output comes in another order, which the site that reads it has taken in."""
    execution: str = "factored"
    cancellation: float = 1.0
    joint: int = 0
    """The number of its joint group, 0 for none."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """The axis that has lost hidden units, ``o`` of a layer that gives them, ``i`` of the one that reads them, and what
    is left of it."""


@dataclass(frozen=True)
class Report:
    """The whole result. ``model_before`` and ``model_after`` are of the whole model, multiply-adds and peak of the
    activations counted while it ran (ONNX: from the shapes of the first calibration batch, 0 where unknown); the sums
    over sites are properties.
    """

    door: str
    metric: str
    statistics: str
    target: str
    budget: str
    sites: tuple[SiteReport, ...]
    model_before: Cost
    model_after: Cost
    remarks: tuple[Remark, ...] = ()
    files: tuple[int, int] | None = None
    """Bytes on disk of the model file, with its external data, before and after; None where there is no file."""

    @property
    def before(self) -> Cost:
        """Dense cost of the candidate sites."""
        return sum((site.before for site in self.sites), Cost(0, 0, 0))

    @property
    def after(self) -> Cost:
        """Cost of the candidate sites now."""
        return sum((site.after for site in self.sites), Cost(0, 0, 0))

    @property
    def replaced(self) -> int:
        """Number of sites that are no longer dense."""
        return sum(site.decomposition != "dense" for site in self.sites)

    @classmethod
    def of(
        cls, door: str, plan: Plan, errors: Mapping[int, tuple[float, float, float]], costs: tuple[Cost, Cost]
    ) -> Report:
        """Put a report together; ``errors`` by ``site.order``: in the metric, of the weight, and the cancellation;
        ``costs`` of the model.
        """
        rows = []
        for choice in plan.choices:
            error, weight_error, cancellation = errors.get(choice.site.order, (0.0, 0.0, 1.0))
            rows.append(
                SiteReport(
                    name=choice.site.name,
                    layer=choice.site.label,
                    decomposition=choice.decomposition,
                    variant=choice.variant,
                    ranks=dict(choice.ranks),
                    planned_error=choice.error,
                    error=error,
                    weight_error=weight_error,
                    before=choice.dense_cost,
                    after=choice.cost,
                    folded=choice.folded,
                    execution=choice.execution,
                    cancellation=cancellation,
                    joint=choice.joint.group if choice.joint else 0,
                    kept=choice.kept,
                )
            )
        head = (door, plan.metric, plan.statistics, plan.target, plan.budget)
        return cls(*head, tuple(rows), *costs, plan.remarks)

    def to_json(self) -> str:
        """The report as a JSON text; :meth:`from_json` reads it."""
        return json.dumps({"format": _FORMAT, "version": 1, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Raises ModelError for a text that is not a report."""
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT or data.pop("version") != 1:
                raise ModelError("not a TDC report of version 1")
            data["sites"] = tuple(
                SiteReport(**{**row, "before": Cost(**row["before"]), "after": Cost(**row["after"])})
                for row in data["sites"]
            )
            data["remarks"] = tuple(Remark(**row) for row in data["remarks"])
            data["files"] = tuple(data["files"]) if data.get("files") else None
            data["model_before"], data["model_after"] = Cost(**data["model_before"]), Cost(**data["model_after"])
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"the report cannot be read: {error}") from error

    def __str__(self) -> str:
        header = ("site", "layer", "decomposition", "ranks", "params", "keep", "error", "weight error")
        rows = []
        for site in self.sites:
            ranks = " ".join(f"{axis}={rank}" for axis, rank in (*site.kept.items(), *site.ranks.items()))
            name = f"{site.decomposition}/{site.variant}" if site.variant else site.decomposition
            name += f" ({site.execution})" if site.execution != "factored" else ""
            name += f" (joint {site.joint})" if site.joint else ""
            keep = site.after.params / site.before.params if site.before.params else 1.0
            counts = (format_count(site.after.params), f"{keep:.3f}", f"{site.error:.2e}", f"{site.weight_error:.2e}")
            rows.append((site.name, site.layer, name, ranks or "-", *counts))
        made = f"budget {self.budget or '-'}, metric {self.metric}, target {self.target}"
        lines = [
            f"{self.replaced} of {len(self.sites)} candidate sites replaced ({made})",
            "",
            format_table(header, rows, left=3),
            "",
        ]
        totals = [
            _total("candidate sites", self.before, self.after),
            _total("whole model", self.model_before, self.model_after),
        ]
        head = ("", "params", "keep", "bytes", "keep", "multiply-adds", "keep", "activations", "keep")
        lines.append(format_table(head, totals))
        if self.files:
            old, new = self.files
            lines.append(f"files: {format_count(old)}B -> {format_count(new)}B, keep {new / old:.4f}")
        lines += ["", *map(str, self.remarks)] if self.remarks else []
        return "\n".join(lines)


def _total(what: str, before: Cost, after: Cost) -> tuple[str, ...]:
    cells = [what]
    for quantity in ("params", "bytes", "macs", "peak"):
        old, new = getattr(before, quantity), getattr(after, quantity)
        cells += [f"{format_count(old)} -> {format_count(new)}", f"{new / old:.4f}"] if old else ["-", "-"]
    return tuple(cells)
