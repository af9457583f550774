from __future__ import annotations

import pytest

from tdc import decompositions, targets
from tdc.errors import OptionError


def test_names_are_sorted_and_dense_is_none_of_them() -> None:
    assert list(decompositions.names()) == sorted(decompositions.names())
    assert "dense" not in decompositions.names()
    assert list(targets.names()) == sorted(targets.names())


@pytest.mark.parametrize("wrong", ["svdd", "SVD", "pivot", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(wrong: str) -> None:
    with pytest.raises(OptionError, match=f"unknown decomposition {wrong!r}.*Known: .*svd"):
        decompositions.get(wrong)


@pytest.mark.parametrize(("wrong", "right"), [("svdd", "svd"), ("pivotted", "pivoted")])
def test_a_misspelt_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"did you mean {right!r}"):
        decompositions.get(wrong)


def test_auto_is_a_known_target() -> None:
    assert targets.get("auto") in [targets.get(name) for name in targets.names()]
    with pytest.raises(OptionError, match="unknown target 'tpu'"):
        targets.get("tpu")
