from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from tdc.ir import OpKind, Site, Window, assign, same_weight, window_attributes
from tdc.testing import random_site, random_weight, random_weight_of


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


WINDOWS = (Window("p", 3, 2, 1, 1, 0), Window("q", 2, 1, 3, auto="lower"))


def image(**changes: object) -> Site:
    weight = random_weight_of({"g": 2, "o": 4, "i": 3, "p": 3, "q": 2})
    return dataclasses.replace(random_site(weight, groups=2, windows=WINDOWS, bias=True), **changes)


def test_a_convolution_is_written_and_read_with_its_windows() -> None:
    site = image(norm="bn", layout="channels_last")
    assert Site.from_dict(site.to_dict()) == site
    again = Site.from_dict(site.to_dict())
    assert (again.bias, again.norm, again.layout, again.windows) == (True, "bn", "channels_last", WINDOWS)
    assert dict(site.attributes) == {"stride": "2 1", "dilation": "1 3", "padding": "1:0 lower"}
    assert window_attributes(site.windows) == site.attributes


def test_a_convolution_is_a_matrix_for_each_group() -> None:
    assert image().kind is OpKind.CONV2D
    assert image().matrix == (2, 4, 18)
    assert image().params == 2 * 4 * 18
    assert image().label == "conv2d 2*4x3x3x2/2"
    assert site().matrix == (1, 12, 8)


def test_another_stride_is_another_operator() -> None:
    moved = (dataclasses.replace(WINDOWS[0], stride=1), WINDOWS[1])
    assert same_weight(image(), image())
    assert not same_weight(image(), image(attributes=window_attributes(moved)))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "needs stride, dilation and padding of 2 axes"),
        ({"stride": "2", "dilation": "1 1", "padding": "0:0 0:0"}, "needs stride, dilation and padding of 2 axes"),
        ({"stride": "2 0", "dilation": "1 1", "padding": "0:0 0:0"}, "impossible window"),
        ({"stride": "2 1", "dilation": "1 1", "padding": "0:0 -1:0"}, "impossible window"),
        ({"stride": "2 1", "dilation": "1 1", "padding": "0:0 same"}, "same"),
    ],
)
def test_a_convolution_with_broken_windows_is_refused(attributes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Site.from_dict({**image().to_dict(), "attributes": attributes})


@pytest.mark.parametrize("length", [5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_positions_of_a_window_are_those_of_torch(length: int, stride: int, dilation: int) -> None:
    for auto in ("", "upper", "lower"):
        window = Window("p", 3, stride, dilation, 0 if auto else 2, 0 if auto else 1, auto)
        padded = functional.pad(torch.zeros(1, 1, length), window.padding(length))
        assert functional.conv1d(padded, torch.zeros(1, 1, 3), None, stride, 0, dilation).shape[2] == window.positions(
            length
        )
        if auto:
            assert window.positions(length) == -(-length // stride)
            before, after = window.padding(length)
            assert before - after in ((0, -1) if auto == "upper" else (0, 1))


def test_a_window_that_never_fits_has_no_position() -> None:
    assert Window("p", 5).positions(3) == 0
