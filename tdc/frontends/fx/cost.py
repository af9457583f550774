"""What a graph holds, and what a run of it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from ...errors import CalibrationError
from ...ir import Cost
from ..count import Counter
from .captured import Bound, Captured, Values
from .match import storage_key

__all__ = ["graph_cost"]


def graph_cost(bound: Bound, held: Iterable[Tensor], values: Values | None) -> Cost:
    """Numbers and bytes of the tensors ``held``, each memory once; multiply-adds and peak bytes of activations of one
    run, 0 without values, and for graphs with operators that take graphs (``torch.cond``).
    """
    stored = {storage_key(t): t for t in held}.values()
    return Cost(
        sum(t.numel() for t in stored if t.is_floating_point()),
        sum(t.numel() * t.element_size() for t in stored),
        *_run_cost(bound, values),
    )


def _run_cost(bound: Bound, values: Values | None) -> tuple[float, int]:
    if values is None:
        return 0.0, 0
    counter = Counter()  # entered inside the run, which switches other modes off
    try:
        Bound(replace(bound.captured, context=lambda: _both(bound.captured, counter)), bound.tensors).run(values)
    except CalibrationError as error:
        if isinstance(error.__cause__, NotImplementedError):  # no mode looks into these operators
            return 0.0, 0
        raise
    return counter.macs, counter.peak


@contextmanager
def _both(captured: Captured, counter: Counter) -> Iterator[None]:
    with captured.context(), counter:
        yield
