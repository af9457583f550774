"""Products of several tensors with named axes, in the order that needs the fewest multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import opt_einsum
import torch
from torch import Tensor

__all__ = ["Named", "contract", "macs"]

Named = tuple[Tensor, tuple[str, ...]]
"""A tensor and the names of its axes. Equal names are multiplied, and summed where the result lacks them."""

_LARGEST = 1 << 24
_CHUNKS = (4, 16, 64)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class _Plan:
    """Steps (positions of what is multiplied, einsum text), in ``chunks`` parts along axis ``place`` of the result."""

    steps: tuple[tuple[tuple[int, ...], str], ...]
    macs: int
    largest: int
    letter: str = ""
    chunk: int = 0


def contract(operands: Sequence[Named], output: tuple[str, ...]) -> Tensor:
    """The product of the operands with the axes ``output``.

    No intermediate result has more than 2^24 entries, if there is such an order: where none is as cheap, the product
    is made in slices along one axis of the result.
    """
    text, shapes = _written([(axes, tuple(value.shape)) for value, axes in operands], output)
    plan, values = _plan(text, shapes), [value for value, _ in operands]
    if not plan.letter:
        return _run(plan, values)
    terms, result = text.split("->")[0].split(","), text.split("->")[1]
    size = next(s[t.index(plan.letter)] for t, s in zip(terms, shapes, strict=True) if plan.letter in t)
    parts = []
    for start in range(0, size, plan.chunk):
        length = min(plan.chunk, size - start)
        pieces = [
            value.narrow(term.index(plan.letter), start, length) if plan.letter in term else value
            for term, value in zip(terms, values, strict=True)
        ]
        parts.append(_run(plan, pieces))
    return torch.cat(parts, result.index(plan.letter))


def macs(operands: Sequence[tuple[str, ...]], output: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Multiply-adds of that product."""
    terms = [(axes, tuple(sizes[axis.rstrip("'~")] for axis in axes)) for axes in operands]
    return _plan(*_written(terms, output)).macs


def _run(plan: _Plan, operands: Sequence[Tensor]) -> Tensor:
    values = list(operands)
    for places, text in plan.steps:
        taken = [values.pop(place) for place in places]
        values.append(torch.einsum(text, *taken))
    return values[0]


def _written(
    operands: Sequence[tuple[tuple[str, ...], tuple[int, ...]]], output: tuple[str, ...]
) -> tuple[str, tuple[tuple[int, ...], ...]]:
    known = dict.fromkeys(axis for axes, _ in operands for axis in axes)
    code = dict(zip(known, _LETTERS, strict=False))
    text = ",".join("".join(code[axis] for axis in axes) for axes, _ in operands)
    return f"{text}->{''.join(code[axis] for axis in output)}", tuple(shape for _, shape in operands)


@lru_cache(maxsize=4096)
def _plan(text: str, shapes: tuple[tuple[int, ...], ...]) -> _Plan:
    terms, result = text.split("->")[0].split(","), text.split("->")[1]
    sizes = {
        letter: n for term, shape in zip(terms, shapes, strict=True) for letter, n in zip(term, shape, strict=True)
    }
    limit = max([_LARGEST, prod(sizes[letter] for letter in result), *(prod(shape) for shape in shapes)])
    free = _search(text, shapes, sizes, None)
    if free.largest <= limit:
        return free
    within = _search(text, shapes, sizes, limit)
    best = within if within.largest <= limit else None
    for letter in result:
        for chunks in (c for c in _CHUNKS if c <= sizes[letter]):
            chunk = ceil(sizes[letter] / chunks)
            cut = {**sizes, letter: chunk}
            parts = tuple(tuple(cut[a] for a in term) for term in terms)
            found = _search(text, parts, cut, limit)
            total = found.macs * chunks
            if found.largest <= limit and (best is None or total < best.macs):
                best = _Plan(found.steps, total, found.largest, letter, chunk)
    return best or free


def _search(text: str, shapes: tuple[tuple[int, ...], ...], sizes: Mapping[str, int], limit: int | None) -> _Plan:
    try:
        _, info = opt_einsum.contract_path(text, *shapes, shapes=True, optimize="dp", memory_limit=limit)
    except RuntimeError:  # no order keeps to the limit
        _, info = opt_einsum.contract_path(text, *shapes, shapes=True, optimize="dp")
    steps = tuple((places, step) for places, _, step, *_ in info.contraction_list)
    work = sum(prod(sizes[a] for a in set(step) if a.isalpha()) for _, step in steps)
    return _Plan(steps, work, int(info.largest_intermediate))
