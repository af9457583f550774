"""Hidden units between sites: which of them are kept, and the smaller weights around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import Candidate, Hidden, Metric, Plan, Site
from tdc.statistics import SiteStatistics
from tdc.targets import Target

from .base import Members, Unit
from .propose_layouts import metric_of, site_statistics

__all__ = [
    "KEPT",
    "Elimination",
    "eliminated",
    "hidden_members",
    "hidden_step",
    "kept_among",
    "kept_units",
    "met_together",
    "narrowed",
    "sites_of",
    "widened",
]

KEPT = "kept units"
"""The name under which the units that are kept stand beside the factors of each of the sites around them."""
_NEAR = 4
"""Of so many times the units that go in one step, the cheapest ones, these are chosen one after the other."""
_RIDGE = 1e-6
"""Of the mean of the diagonal of the moment of the hidden units."""


def sites_of(site: Site, here: Mapping[int, Site]) -> tuple[Site, ...] | None:
    """The sites around the hidden units that ``site`` reads, itself last; None if there are none that can be left
    out. ``here``: by order.
    """
    producers = [here.get(order) for order in site.hidden_producers]
    found = [p for p in producers if p is not None]
    if not found or len(found) < len(producers) or any(s.uses > 1 or s.kind.is_conv for s in (*found, site)):
        return None
    return (*found, site) if all(p.axes["o"] == site.axes["i"] for p in found) else None


def met_together(sites: Iterable[Site], known: Mapping[int, SiteStatistics]) -> tuple[Site, ...]:
    """The sites that statistics know, linked to those only that read as many rows of the calibration data: where one
    that gives hidden units has run without the one that reads them, something else reads them, too.
    """

    def alike(order: int, site: Site) -> bool:
        return order in known and known[order].seen == known[site.order].seen

    found = []
    for site in (site for site in sites if site.order in known):
        consumer = site.pointwise_consumer
        changes: dict[str, Any] = {}
        if consumer is not None and not alike(consumer, site):
            changes["pointwise_consumer"] = None
        if not all(alike(order, site) for order in site.hidden_producers):
            changes["hidden_producers"] = ()
        found.append(replace(site, **changes) if changes else site)
    return tuple(found)


def hidden_members(choices: Iterable[Candidate]) -> dict[int, Members]:
    """Group number -> choices around the same hidden units; the one that reads them comes last."""
    groups: dict[int, list[Candidate]] = {}
    for choice in choices:
        if choice.hidden is not None:
            groups.setdefault(choice.hidden.group, []).append(choice)
    by_axis = {"o": 0, "i": 1}
    return {
        group: tuple(sorted(members, key=lambda c: (by_axis[c.hidden.axis] if c.hidden else 0, c.site.order)))
        for group, members in groups.items()
    }


@dataclass(frozen=True, eq=False)
class Elimination:
    """Hidden units in the order in which they are left out, and for each number of units that may be kept the relative
    squared error of what reads them.
    """

    order: Tensor
    errors: Mapping[int, float]

    def kept(self, width: int) -> Tensor:
        """The units that are left when there are so many, in rising order."""
        return self.order[len(self.order) - width :].sort().values


def hidden_step(target: Target, units: int) -> int:
    """How many units are left out at a time: what is kept is a multiple of it."""
    return max(1, min(target.rank_step(units), units))


def eliminated(weight: Tensor, metric: Metric, step: int, least: int) -> Elimination:
    """Leave hidden units h out of ``W h``, ``step`` at a time, down to ``least`` (in smaller last steps, if need be):
    those whose part in it the others make up for best.

    With the units K kept, the best weight for them is ``W S[:, K] S[K, K]^-1``, with S the moment of h, and what is
    lost by leaving out one unit j more is ``||R w_j||^2 / (S[K, K]^-1)_jj``, w that weight and ``R^T R`` the moment of
    the gradients (optimal brain surgeon, Hassibi and Stork 1993). Weight and inverse of those that stay follow from
    the ones before: all together it takes no more than some products of matrices of that size.
    """
    whole = decompositions.whitened(weight, metric)
    moment = whole.metric.second_moment
    assert moment is not None
    units, inverse = len(moment), torch.cholesky_inverse(_root(moment))
    rest, alive, gone = whole.weight.clone(), torch.ones(units, dtype=torch.bool), list[Tensor]()
    energy, lost, errors = decompositions.energy(whole.weight[None], whole.metric), 0.0, {}
    left, first = units, units % step or step
    while left > max(least, 1):
        count = min(step if gone else first, left - max(least, 1))
        away = _cheapest(rest, inverse, alive, count)
        rows = inverse[away]
        own = torch.linalg.inv(rows[:, away])
        part = rest[:, away]
        lost += max(float((part @ own * part).sum()), 0.0)
        spread = own @ rows
        rest.addmm_(part, spread, alpha=-1)
        inverse.addmm_(rows.T, spread, alpha=-1)
        gone.append(away)
        alive[away] = False
        left -= count
        errors[left] = lost / energy if energy > 0 else 0.0
    return Elimination(torch.cat([*gone, alive.nonzero()[:, 0]]), errors)


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor of a moment with the least ridge with which it has one."""
    even, mean = (moment + moment.T) / 2, float(moment.diagonal().mean())
    ridge = max(_RIDGE * mean, torch.finfo(moment.dtype).tiny)
    while True:
        root, failed = torch.linalg.cholesky_ex(even + ridge * torch.eye(len(even), dtype=even.dtype))
        if not failed or ridge > mean:
            return root
        ridge *= 10


def _cheapest(rest: Tensor, inverse: Tensor, alive: Tensor, count: int) -> Tensor:
    """Units to leave out one after the other, each with those before it gone, among the ones that are cheapest now."""
    price = (rest.square().sum(0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
    near = torch.topk(price, min(int(alive.sum()), _NEAR * count), largest=False).indices.sort().values
    rest, inverse = rest[:, near], inverse[near][:, near]
    free, chosen = torch.ones(len(near), dtype=torch.bool), list[int]()
    for _ in range(count):
        price = rest.square().sum(0) / inverse.diagonal()
        j = int(price.masked_fill(~free, torch.inf).argmin())
        free[j] = False
        chosen.append(j)
        row = inverse[j] / inverse[j, j]
        rest, inverse = rest - rest[:, j, None] * row, inverse - inverse[:, j, None] * row
        inverse[j, j] = 1.0  # what is gone is not asked again
    return near[torch.tensor(chosen)].sort().values


def kept_units(unit: Unit, plan: Plan) -> dict[int, Tensor]:
    """For each group of a plan the hidden units that are kept, in rising order."""
    found, known = {}, site_statistics(unit)
    for group, members in hidden_members(plan.choices).items():
        reader = members[-1]
        assert reader.hidden is not None
        weight = unit.program.weight(reader.site).double()
        metric = metric_of(unit, reader.site, known.get(reader.site.order), weight)
        width = reader.hidden.width
        found[group] = eliminated(weight, metric, hidden_step(unit.target, weight.shape[1]), width).kept(width)
    return found


def kept_among(factors: Mapping[int, Mapping[str, Tensor]], plan: Plan) -> dict[int, Tensor]:
    """The same, as they stand beside the factors that were fitted."""
    first = {c.hidden.group: c.site.order for c in plan.choices if c.hidden is not None}
    return {group: factors[order][KEPT] for group, order in first.items() if order in factors}


def narrowed(hidden: Hidden | None, kept: Tensor, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """A weight (o, i), float64, with fewer units on one of its axes, and its metric: of a site that gives the units its
    rows, of the one that reads them what makes up best for those that are left out.
    """
    if hidden is None:
        return weight, metric
    if hidden.axis == "o":
        gradient = None if metric.gradient is None else metric.gradient[kept][:, kept]
        return weight[kept].contiguous(), replace(metric, gradient=gradient)
    moment = metric.second_moment
    assert moment is not None
    own = moment[kept][:, kept]
    best = torch.cholesky_solve(moment[kept] @ weight.T, _root(own)).T
    mean = None if metric.mean is None else metric.mean[..., kept]
    return best.contiguous(), replace(metric, second_moment=own, mean=mean)


def widened(hidden: Hidden | None, kept: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """The smaller weight in the place of the dense one: units that are left out are given as they were, and read with
    weight zero.
    """
    if hidden is None:
        return small
    whole = weight.to(small.dtype).clone() if hidden.axis == "o" else torch.zeros_like(weight, dtype=small.dtype)
    if hidden.axis == "o":
        whole[kept] = small
    else:
        whole[:, kept] = small
    return whole
