"""Plans: what is decided for every site, before anything is cut. A plan is a JSON file that a person can read
and edit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .metric import METRICS
from .remark import Remark
from .site import Site, assign

__all__ = ["DENSE", "EXECUTIONS", "PLAN_VERSION", "Candidate", "Cost", "Hidden", "Joint", "Plan", "Rival"]

PLAN_VERSION = 1
DENSE = "dense"
_RIVAL = ("decomposition", "variant", "ranks", "error", "loss", "params", "priced")
EXECUTIONS = ("factored", "stored", "rebuilt")
_FORMAT = "tdc-plan"
_HEAD = ("metric", "statistics", "target", "budget", "allocation", "seed")
_ROW = frozenset(
    """
    name decomposition variant ranks execution folded error sensitivity cost dense_cost site considered joint hidden
    """.split()
)


@dataclass(frozen=True, slots=True)
class Cost:
    """``params`` real numbers stored, ``bytes`` stored (indices included), ``macs`` multiply-adds per example, ``peak``
    bytes of activations that live at the same time (of several sites the most of any, since they run in turn),
    ``seconds`` that a run takes, where it was measured, else 0.
    """

    params: int
    bytes: int
    macs: float
    peak: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.bytes + other.bytes,
            self.macs + other.macs,
            max(self.peak, other.peak),
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Rival:
    """A layout that was considered for a site beside the one that was chosen. ``loss``: predicted change of the model's
    output; ``priced``: that and what its cost is worth in loss elsewhere. With a ``group`` it is one that several sites
    would take together: ``priced`` is what the whole group would take then, less the best of the others by themselves,
    and ``ranks`` has the axis that is smaller too.
    """

    decomposition: str
    variant: str
    ranks: tuple[tuple[str, int], ...]
    error: float
    loss: float
    params: int
    priced: float
    group: int = 0


@dataclass(frozen=True)
class Joint:
    """What sites decide together that read the same input: one layout for their weights, one above the other. The
    factors without outputs are the same for all of them; what is computed with these is computed once.

    ``group``: a number that the sites have in common; ``outputs``: of all of them together.
    """

    group: int
    outputs: int


@dataclass(frozen=True)
class Hidden:
    """What sites decide together that have hidden units between them, elementwise functions of their outputs: only
    ``width`` of the units are kept. ``axis``: ``o`` of the sites that give them, ``i`` of the one that reads them.

    ``group``: a number that the sites have in common.
    """

    group: int
    axis: str
    width: int


@dataclass(frozen=True)
class Candidate:
    """The decision for one site. ``ranks`` is empty for ``dense``.

    ``error`` is the predicted relative squared error of the weight in the plan's metric, in [0, 1]; ``sensitivity`` the
    change of the model's output per unit of it. Two choices are equal if they decide the same for the same weight.
    """

    site: Site
    decomposition: str
    variant: str = ""
    ranks: tuple[tuple[str, int], ...] = ()
    error: float = field(default=0.0, compare=False)
    sensitivity: float = field(default=1.0, compare=False)
    cost: Cost = field(default=Cost(0, 0, 0), compare=False)
    dense_cost: Cost = field(default=Cost(0, 0, 0), compare=False)
    execution: str = "factored"
    """How it runs: ``factored``, the factors one after the other; ``stored``, they build the dense weight once, when
    the model is loaded, which saves storage and nothing else; ``rebuilt``, they build it at every call, so that it does
    not stay in memory.
    """
    folded: bool = field(default=False, compare=False)
    """The output comes in the order of the stack: its gather is folded into the site that reads it."""
    rivals: tuple[Rival, ...] = field(default=(), compare=False)
    """The best layout of each format that was considered, at the prices of the plan, the chosen one among them."""
    joint: Joint | None = field(default=None, compare=False)
    """With which sites it is decided; ``error`` is that of all of them together then, and the first one bears the cost
    of what they share."""

    hidden: Hidden | None = None
    """Which of its axes is smaller, and with which sites that is decided."""

    @property
    def kept(self) -> dict[str, int]:
        """The axis that is smaller than in the dense weight, and its size; {} where all are as they were."""
        return {} if self.hidden is None else {self.hidden.axis: self.hidden.width}

    @property
    def group(self) -> int:
        """That of the sites with which it is decided, 0 where it is decided by itself."""
        return next((own.group for own in (self.joint, self.hidden) if own is not None), 0)

    @property
    def is_dense(self) -> bool:
        return self.decomposition == DENSE


@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions for all candidate sites, with what they were made from.

    ``statistics`` is the digest of the statistics, '' for the metric ``weight``. Two plans are equal if they have the
    same metric, digest, target and budget and decide the same for the same weights, whatever the names and the order;
    weights are the same as far as their sketches tell (see :func:`tdc.ir.same_weight`).
    """

    choices: tuple[Candidate, ...] = ()
    metric: str = "weight"
    statistics: str = ""
    target: str = "cpu"
    budget: str = ""
    allocation: str = "lagrangian"
    seed: int = 0
    remarks: tuple[Remark, ...] = ()
    bound: float | None = None
    """No choice among the candidates within the budget is predicted to lose less than this; None if it is not known."""
    price: tuple[tuple[str, float], ...] = ()
    """Of each quantity of the budget: the loss that one more unit of it saves, about."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or self._head() != other._head():
            return False
        theirs = {id(choice.site): choice for choice in other.choices}
        found = assign([choice.site for choice in self.choices], [choice.site for choice in other.choices])
        pairs = zip(self.choices, found, strict=True)
        return all(site is not None and _same_decision(choice, theirs[id(site)]) for choice, site in pairs)

    def __hash__(self) -> int:
        return hash(self._head())

    def _head(self) -> tuple[object, ...]:
        return (self.metric, self.statistics, self.target, self.budget, self.allocation, len(self.choices))

    @property
    def cost(self) -> Cost:
        """Cost of the candidate sites under this plan."""
        return sum((candidate.cost for candidate in self.choices), Cost(0, 0, 0))

    @property
    def dense_cost(self) -> Cost:
        """Cost of the candidate sites before."""
        return sum((candidate.dense_cost for candidate in self.choices), Cost(0, 0, 0))

    @property
    def loss(self) -> float:
        """The change of the model's output that is predicted, ``sum_s sensitivity_s error_s`` over the sites; without
        sensitivities the sum of the relative errors.
        """
        return sum(candidate.sensitivity * candidate.error for candidate in self.choices)

    def explain(self, *names: str) -> str:
        """Why each site is what it is: the best layout of each format that was considered, with its predicted error and
        loss, and the loss that its cost would save elsewhere; by default of all sites.

        Raises PlanError for a name that the plan does not have.
        """
        from .text import plan_explanation

        known = {name for choice in self.choices for name in choice.site.names}
        if unknown := sorted(set(names) - known):
            raise PlanError(f"the plan has no site {', '.join(unknown)}")
        chosen = [c for c in self.choices if not names or set(names) & set(c.site.names)]
        return plan_explanation(self, chosen)

    def to_json(self) -> str:
        """The plan as a JSON text: keys in a fixed order, one site a line; equal plans of one door give equal bytes."""
        head: dict[str, Any] = {"format": _FORMAT, "version": PLAN_VERSION}
        for key in _HEAD:
            head[key] = getattr(self, key)
        if self.bound is not None:
            head["bound"] = self.bound
        if self.price:
            head["price"] = dict(self.price)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        rows = {"sites": [_candidate_out(c) for c in self.choices], "remarks": [_remark_out(r) for r in self.remarks]}
        for key, items in rows.items():
            body = ",\n    ".join(json.dumps(item, allow_nan=False) for item in items)
            lines.append(f'"{key}": [\n    {body}\n  ]' if items else f'"{key}": []')
        return "{\n  " + ",\n  ".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote, or a person edited. Raises PlanError with the place and the reason."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise PlanError(f'not a TDC plan: the key "format" must be "{_FORMAT}"')
        if data.get("version") != PLAN_VERSION:
            raise PlanError(f"plan version {data.get('version')!r} cannot be read: this TDC reads {PLAN_VERSION}")
        if unknown := sorted(set(data) - {"format", "version", "sites", "remarks", "bound", "price", *_HEAD}):
            raise PlanError(f"unknown keys in the plan: {unknown}")
        if data.get("metric", "weight") not in METRICS:
            raise PlanError(f"the plan's metric must be one of {', '.join(METRICS)}; got {data.get('metric')!r}")
        if not isinstance(data.get("sites"), list):
            raise PlanError('the plan lacks its list of "sites"')
        try:
            head: dict[str, Any] = {
                key: _whole(data[key]) if key == "seed" else str(data[key]) for key in _HEAD if key in data
            }
            head["bound"] = None if data.get("bound") is None else _finite(data["bound"])
            head["price"] = tuple((str(key), _finite(value)) for key, value in data.get("price", {}).items())
            remarks = tuple(Remark(str(r["site"]), str(r["stage"]), str(r["reason"])) for r in data.get("remarks", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan lacks or misspells {error}") from error
        choices = tuple(_candidate_in(k, row) for k, row in enumerate(data["sites"]))
        return cls(choices=choices, remarks=remarks, **head)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises PlanError."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the plan file {path} cannot be read: {error}") from error

    def __str__(self) -> str:
        from .text import plan_table

        return plan_table(self)


def _same_decision(a: Candidate, b: Candidate) -> bool:
    if (a.joint is None) != (b.joint is None) or (a.joint and b.joint and a.joint.outputs != b.joint.outputs):
        return False
    return all(getattr(a, key) == getattr(b, key) for key in ("decomposition", "variant", "ranks", "execution", "kept"))


def _remark_out(remark: Remark) -> dict[str, str]:
    return {"site": remark.site, "stage": remark.stage, "reason": remark.reason}


def _cost_out(cost: Cost) -> dict[str, float]:
    timed = {"seconds": cost.seconds} if cost.seconds else {}
    return {"params": cost.params, "bytes": cost.bytes, "macs": cost.macs, "peak": cost.peak, **timed}


def _candidate_out(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.site.name,
        "decomposition": candidate.decomposition,
        "variant": candidate.variant,
        "ranks": dict(candidate.ranks),
        "execution": candidate.execution,
        "folded": candidate.folded,
        "error": candidate.error,
        "sensitivity": candidate.sensitivity,
        "cost": _cost_out(candidate.cost),
        "dense_cost": _cost_out(candidate.dense_cost),
        "site": candidate.site.to_dict(),
        **({"joint": asdict(candidate.joint)} if candidate.joint else {}),
        **({"hidden": asdict(candidate.hidden)} if candidate.hidden else {}),
        **({"considered": [_rival_out(rival) for rival in candidate.rivals]} if candidate.rivals else {}),
    }


def _rival_out(rival: Rival) -> dict[str, Any]:
    own = {**{key: getattr(rival, key) for key in _RIVAL}, "ranks": dict(rival.ranks)}
    return {**own, **({"group": rival.group} if rival.group else {})}


def _rival_in(row: Mapping[str, Any]) -> Rival:
    return Rival(
        decomposition=str(row["decomposition"]),
        variant=str(row["variant"]),
        ranks=tuple((str(axis), _whole(rank)) for axis, rank in row["ranks"].items()),
        error=_finite(row["error"]),
        loss=_finite(row["loss"]),
        params=_whole(row["params"]),
        priced=_finite(row["priced"]),
        group=_whole(row.get("group", 0)),
    )


def _candidate_in(position: int, row: Mapping[str, Any]) -> Candidate:
    if not isinstance(row, dict):
        raise PlanError(f"site {position} of the plan is not an object")
    if unknown := sorted(set(row) - _ROW):
        raise PlanError(f"unknown keys in site {position} ({row.get('name', 'no name')!r}) of the plan: {unknown}")
    try:
        return Candidate(
            site=Site.from_dict(row["site"]),
            decomposition=str(row["decomposition"]),
            variant=str(row.get("variant", "")),
            ranks=tuple((str(axis), _whole(rank)) for axis, rank in row["ranks"].items()),
            execution=_one_of(row.get("execution", EXECUTIONS[0]), EXECUTIONS),
            error=_finite(row.get("error", 0.0)),
            sensitivity=_finite(row.get("sensitivity", 1.0)),
            cost=_cost_in(row.get("cost")),
            dense_cost=_cost_in(row.get("dense_cost")),
            folded=bool(row.get("folded", False)),
            rivals=tuple(_rival_in(rival) for rival in row.get("considered", ())),
            joint=Joint(_whole(row["joint"]["group"]), _whole(row["joint"]["outputs"])) if row.get("joint") else None,
            hidden=_hidden_in(row["hidden"]) if row.get("hidden") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        where = f"site {position} ({row.get('name', 'no name')!r}) of the plan"
        raise PlanError(f"{where} cannot be read: {type(error).__name__}, {error}") from error


def _hidden_in(row: Mapping[str, Any]) -> Hidden:
    return Hidden(_whole(row["group"]), _one_of(row["axis"], ("o", "i")), _whole(row["width"]))


def _cost_in(row: Mapping[str, Any] | None) -> Cost:
    if not row:
        return Cost(0, 0, 0)
    counts = _whole(row["params"]), _whole(row["bytes"]), _finite(row["macs"]), _whole(row.get("peak", 0))
    return Cost(*counts, _finite(row.get("seconds", 0.0)))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _one_of(value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
