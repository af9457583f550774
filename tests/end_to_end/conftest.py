"""What tests of compiled models share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tdc import decompositions
from tdc.ir import Candidate, Plan, Site


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the backend with which every site is decomposed at full rank, so that right is eager."""
    from tdc import _planning

    def plan(plan: Plan, sites: tuple[Site, ...]) -> Plan:
        names = {site.order: "output_svd" if site.kind.is_conv else "svd" for site in sites}
        ranks = {s.order: tuple(decompositions.get(names[s.order]).full_ranks(s.axes, "").items()) for s in sites}
        return Plan(tuple(Candidate(site, names[site.order], ranks=ranks[site.order]) for site in sites))

    monkeypatch.setattr(_planning, "_part_of", plan)
    return {"plan": Plan(), "inner": "eager", "strict": True}
