"""What was considered for a site beside what was chosen: single layouts, and those of groups of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdc.ir import Candidate, Cost, Rival

from .base import Members, Unit

__all__ = ["alone", "cost_of", "group_offers", "loss_of", "priced", "rivals_of"]


def cost_of(members: Members) -> Cost:
    return sum((c.cost for c in members), Cost(0, 0, 0))


def loss_of(members: Members) -> float:
    return sum(c.sensitivity * c.error for c in members)


def priced(members: Members, price: Mapping[str, float]) -> float:
    """What the candidates lose, and what their cost is worth in loss elsewhere."""
    cost = cost_of(members)
    return loss_of(members) + sum(value * getattr(cost, key) for key, value in price.items())


def alone(unit: Unit, order: int, price: Mapping[str, float]) -> float:
    """What a site takes at these prices when it is decided by itself."""
    return min(priced((c,), price) for c in unit.candidates[order])


def group_offers(unit: Unit, chosen: Sequence[Candidate], price: Mapping[str, float]) -> dict[int, tuple[Rival, ...]]:
    """``site.order`` -> what each of its groups would take at these prices, of a chosen group what it takes."""
    taken = {c.site.order: c for c in chosen}
    found: dict[int, tuple[Rival, ...]] = {}
    for group, options in unit.joint.items():
        orders = [c.site.order for c in options[0]]
        if any(taken[order].group == group for order in orders):
            members: Members = tuple(taken[order] for order in orders)
        else:
            members = min(options, key=lambda own: priced(own, price))
        apart = [alone(unit, order, price) for order in orders]
        for member, own in zip(members, apart, strict=True):
            rival = _rival(member, priced(members, price) - sum(apart) + own, group)
            found[member.site.order] = (*found.get(member.site.order, ()), rival)
    return found


def rivals_of(
    row: Sequence[Candidate], chosen: Candidate, price: Mapping[str, float], offers: Sequence[Rival]
) -> tuple[Rival, ...]:
    """Of each format the candidate of least loss at these prices, of the chosen one's that one; and the offers of
    groups.
    """
    best: dict[tuple[str, str, str], Candidate] = {}
    for candidate in [c for c in row if not c.group]:
        key = (candidate.decomposition, candidate.variant, candidate.execution)
        before = None if candidate is chosen else best.get(key)
        if before is None or (before is not chosen and priced((candidate,), price) < priced((before,), price)):
            best[key] = candidate
    rivals = [*(_rival(c, priced((c,), price)) for c in best.values()), *offers]
    return tuple(sorted(rivals, key=lambda rival: rival.priced))


def _rival(candidate: Candidate, worth: float, group: int = 0) -> Rival:
    return Rival(
        decomposition=candidate.decomposition,
        variant=candidate.variant,
        ranks=(*candidate.kept.items(), *candidate.ranks) if group else candidate.ranks,
        error=candidate.error,
        loss=float(f"{candidate.sensitivity * candidate.error:.6g}"),
        params=candidate.cost.params,
        priced=float(f"{worth:.6g}"),
        group=group,
    )
