"""The sizes that axes are split into."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import prod

import pytest

from tdc.decompositions._shapes import balanced, led, measured


@pytest.mark.parametrize(
    ("size", "parts", "factors"),
    [
        (4096, 2, (64, 64)),
        (4096, 3, (16, 16, 16)),
        (4096, 4, (8, 8, 8, 8)),
        (768, 2, (24, 32)),
        (1001, 2, (28, 36)),
        (37, 2, (2, 19)),
        (53, 2, (6, 9)),
        (4, 2, (2, 2)),
        (6, 1, (6,)),
        (30, 3, (2, 3, 5)),
    ],
)
def test_sizes_are_split_evenly_with_little_padding(size: int, parts: int, factors: tuple[int, ...]) -> None:
    assert balanced(size, parts) == factors


@pytest.mark.parametrize(("size", "parts"), [(1, 2), (2, 2), (3, 2), (5, 2), (7, 2), (13, 2), (19, 2), (6, 3), (12, 4)])
def test_small_primes_and_small_sizes_are_not_split(size: int, parts: int) -> None:
    assert balanced(size, parts) is None


@pytest.mark.parametrize("size", range(2, 130))
@pytest.mark.parametrize("parts", [2, 3])
def test_no_other_split_has_a_smaller_product_of_sum_and_size(size: int, parts: int) -> None:
    every = [f for f in combinations_with_replacement(range(2, size + 8), parts) if size <= prod(f) <= 1.05 * size]
    found = balanced(size, parts)
    assert (found is None) == (not every)
    if found is not None:
        assert found == min(every, key=lambda f: (sum(f) * prod(f), prod(f), f))


@pytest.mark.parametrize(
    ("size", "first", "found"), [(64, 8, (8, 8)), (63, 8, (8, 8)), (60, 8, None), (100, 4, (4, 25)), (15, 4, None)]
)
def test_a_first_factor_leaves_a_second_one_that_is_no_smaller(
    size: int, first: int, found: tuple[int, int] | None
) -> None:
    assert led(size, first) == found


def test_sizes_get_names_unless_one_side_has_none() -> None:
    assert measured("o1 o2 i1 i2", (2, 3), (4, 5)) == {"o1": 2, "o2": 3, "i1": 4, "i2": 5}
    assert measured("o1 o2 i1 i2", None, (4, 5)) == measured("o1 o2 i1 i2", (2, 3), None) == {}
