from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Layout, Rebuild
from tdc.testing import EXAMPLE_AXES, applicable, variants_of

OUTPUT = "o i = pivot(coef, place)[o r] rows[r i]"
INPUT = "o i = cols[o r] pivot(coef, order)[r i]"
SUM = "o i = base[o i] + u[o r] v[r i]"


@pytest.mark.parametrize("text", [OUTPUT, INPUT, SUM, "o i = u[o r] v[r i]", "o i = c[s t] u[o s] v[t i]"])
def test_printing_and_parsing_is_the_identity(text: str) -> None:
    rebuilt = Rebuild.parse(text)
    assert str(rebuilt) == text
    assert Rebuild.parse(str(rebuilt)) == rebuilt


@pytest.mark.parametrize("name", decompositions.names())
def test_every_equation_of_the_registry_prints_as_it_is_written(name: str) -> None:
    d = decompositions.get(name)
    for axes in EXAMPLE_AXES.values():
        for variant in variants_of(name, axes):
            text = d.equations[variant].replace("*", " ".join([*axes][3:] if "g" in axes else []))
            assert str(Rebuild.parse(text)) == text == str(d.rebuild(axes, variant))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("o i = u[o r] v", "cannot read the factors"),
        ("o i = ", "cannot read the factors"),
        ("o i = u[r i]", "come from no input"),
        ("o i = pivot(coef)[o r] rows[r i]", "cannot read the factors"),
        ("o i = pivot(coef, place)[o i]", "one axis of the weight and one rank; got o i"),
        ("o i = pivot(coef, place)[o r q] rows[r q i]", "one axis of the weight and one rank; got o r q"),
    ],
)
def test_what_is_no_rebuild_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rebuild.parse(text)


def test_one_factor_with_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="two different terms"):
        Rebuild.parse("o i = u[o i] + u[i o]").factors  # noqa: B018


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"o": 4, "i": 3}, r"no size given for \['r'\]"),
        ({"o": 4, "i": 3, "r": 5}, "r is larger than o, of which it is a part"),
        ({"o": 4, "i": -3, "r": 2}, "negative size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(Rebuild.parse(OUTPUT), tuple(sizes.items()))


@given(o=st.integers(2, 20), i=st.integers(1, 20), p=st.integers(1, 20))
def test_counts_are_those_of_the_shapes(o: int, i: int, p: int) -> None:
    p = min(p, o)
    layout = Layout(Rebuild.parse(OUTPUT), (("o", o), ("i", i), ("r", p)))
    assert layout.shapes == {"rows": (p, i), "coef": (o - p, p), "place": (o,)}
    assert layout.params == p * i + (o - p) * p


def test_a_leading_pivot_says_where_each_row_of_the_weight_stands() -> None:
    layout = Layout(Rebuild.parse(OUTPUT), (("o", 3), ("i", 1), ("r", 2)))
    factors = {"coef": torch.tensor([[1.0, 1.0]]), "rows": torch.tensor([[10.0], [20.0]])}
    assert rebuild({**factors, "place": torch.tensor([2, 0, 1])}, layout).flatten().tolist() == [30, 10, 20]


def test_a_trailing_pivot_says_which_column_of_the_weight_each_one_is() -> None:
    layout = Layout(Rebuild.parse(INPUT), (("o", 1), ("i", 3), ("r", 2)))
    factors = {"cols": torch.tensor([[10.0, 20.0]]), "coef": torch.tensor([[1.0], [1.0]])}
    assert rebuild({**factors, "order": torch.tensor([2, 0, 1])}, layout).flatten().tolist() == [20, 30, 10]


def test_the_identities_of_all_groups_stand_first_in_the_stack() -> None:
    """Two groups of three rows, one row kept of each: identities at 0 and 1, the coefficients behind them."""
    text = "(g o) i p = pivot(coef, place)[(g o) r] rows[(g r) i p]"
    layout = Layout(Rebuild.parse(text), (("g", 2), ("o", 3), ("i", 1), ("p", 1), ("r", 1)))
    assert layout.shapes == {"coef": (4, 1), "rows": (2, 1, 1), "place": (6,)}
    factors = {
        "coef": torch.tensor([[2.0], [3.0], [4.0], [5.0]]),
        "rows": torch.tensor([10.0, 100.0]).reshape(2, 1, 1),
        "place": torch.tensor([2, 0, 3, 4, 5, 1]),
    }
    assert rebuild(factors, layout).flatten().tolist() == [20, 10, 30, 400, 500, 100]


def test_a_sum_adds_its_pieces() -> None:
    layout = Layout(Rebuild.parse(SUM), (("o", 2), ("i", 2), ("r", 1)))
    factors = {"base": torch.eye(2), "u": torch.tensor([[1.0], [2.0]]), "v": torch.tensor([[3.0, 4.0]])}
    assert rebuild(factors, layout).tolist() == [[4, 4], [6, 9]]


def test_layouts_print_as_equation_and_sizes(golden: Callable[[str], None]) -> None:
    axes = {"o": 12, "i": 8}
    texts = []
    for name in applicable(axes, by_default=True):
        for variant in variants_of(name, axes):
            layout = decompositions.get(name).layout(axes, {"r": 3}, variant)
            texts.append(f"{name} {variant or '-'}: {layout}\n  {layout.shapes}\n  {layout.params} numbers")
    golden("\n".join(texts))


@pytest.mark.parametrize("kind", ["conv2d-groups", "conv3d"])
def test_layouts_of_convolutions_print_as_equation_and_sizes(golden: Callable[[str], None], kind: str) -> None:
    axes, texts = EXAMPLE_AXES[kind], []
    for name in applicable(axes, by_default=True):
        d = decompositions.get(name)
        for variant in variants_of(name, axes):
            layout = d.layout(axes, dict.fromkeys(d.full_ranks(axes, variant), 2), variant)
            texts.append(f"{name} {variant or '-'}: {layout}\n  {layout.shapes}\n  {layout.params} numbers")
    golden("\n".join(texts))
