from __future__ import annotations

import dataclasses

import pytest

from tdc.ir import Site, assign, same_weight
from tdc.testing import random_site, random_weight


def site(seed: int = 0, *, order: int = 0, shape: tuple[int, int] = (12, 8)) -> Site:
    return random_site(random_weight(*shape, seed=seed), order=order, name=f"layer{order}.weight")


def test_writing_and_reading_is_the_identity() -> None:
    assert Site.from_dict(site(order=3).to_dict()) == site(order=3)
    assert Site.from_dict(site(order=3).to_dict()).names == ("layer3.weight",)


@pytest.mark.parametrize(
    "change", [{"names": []}, {"kind": "conv"}, {"sizes": {"o": "x"}}, {"sketch": ["x"]}, {"order": None}]
)
def test_a_broken_site_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Site.from_dict({**site().to_dict(), **change})


def test_numbers_are_counted() -> None:
    assert site().params == 96
    assert site().label == "linear 12x8"
    assert not site().tied
    assert dataclasses.replace(site(), uses=2).tied


def test_a_weight_is_recognised_by_shape_and_sketch_and_not_by_name() -> None:
    assert same_weight(site(order=1), site(order=5))
    assert not same_weight(site(0), site(1))
    assert not same_weight(site(), site(shape=(8, 12)))
    assert not same_weight(site(), dataclasses.replace(site(), attributes=(("groups", "2"),)))


def test_each_wanted_site_gets_its_own_weight() -> None:
    found = [site(0, order=0), site(1, order=1), site(2, order=2)]
    assert assign([site(2, order=9), site(0, order=4), site(7)], found) == [found[2], found[0], None]


def test_equal_weights_are_paired_in_order_and_the_last_serves_the_rest() -> None:
    found = [site(order=5), site(order=2)]
    answer = assign([site(order=0), site(order=1), site(order=7)], found)
    assert [match.order for match in answer if match] == [2, 5, 5]


def test_a_weight_without_a_sketch_fits_nothing() -> None:
    unknown = dataclasses.replace(site(), sketch=())
    assert assign([unknown], [unknown]) == [None]
