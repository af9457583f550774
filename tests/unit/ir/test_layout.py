from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.ir import Layout, Rebuild

OUTPUT = "o i = rows[p i] | coef[q p] rows[p i] over o = p q at place"
INPUT = "o i = cols[o p] | cols[o p] coef[p q] over i = p q by order"
SUM = "o i = base[o i] + u[o r] v[r i]"


@pytest.mark.parametrize("text", [OUTPUT, INPUT, SUM, "o i = u[o r] v[r i]", "o i = c[s t] u[o s] v[t i]"])
def test_printing_and_parsing_is_the_identity(text: str) -> None:
    rebuilt = Rebuild.parse(text)
    assert str(rebuilt) == text
    assert Rebuild.parse(str(rebuilt)) == rebuilt


@pytest.mark.parametrize("name", decompositions.names())
def test_every_equation_of_the_registry_prints_as_it_is_written(name: str) -> None:
    for text in decompositions.get(name).equations.values():
        assert str(Rebuild.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("o i = u[o r] v", "cannot read the factors"),
        ("o i = ", "cannot read the factors"),
        ("o i = u[r i]", "come from no input"),
        ("o i = a[p i] | b[q i] over o = p q", "write 'over o = p q at place'"),
        ("o i = a[p i] | b[q i] over o = p q s at place", "2 pieces but 3 parts"),
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
        ({"o": 4, "i": 3, "p": 2}, r"no size given for \['q'\]"),
        ({"o": 4, "i": 3, "p": 2, "q": 3}, "do not add up"),
        ({"o": 4, "i": -3, "p": 2, "q": 2}, "negative size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(Rebuild.parse(OUTPUT), tuple(sizes.items()))


@given(o=st.integers(2, 20), i=st.integers(1, 20), p=st.integers(1, 20))
def test_counts_are_those_of_the_shapes(o: int, i: int, p: int) -> None:
    p = min(p, o)
    layout = Layout(Rebuild.parse(OUTPUT), (("o", o), ("i", i), ("p", p), ("q", o - p)))
    assert layout.shapes == {"rows": (p, i), "coef": (o - p, p), "place": (o,)}
    assert layout.params == p * i + (o - p) * p


def test_at_says_where_each_row_of_the_weight_stands() -> None:
    layout = Layout(
        Rebuild.parse("o i = a[p i] | b[q i] over o = p q at place"), (("o", 3), ("i", 1), ("p", 2), ("q", 1))
    )
    factors = {"a": torch.tensor([[10.0], [20.0]]), "b": torch.tensor([[30.0]]), "place": torch.tensor([2, 0, 1])}
    assert rebuild(factors, layout).flatten().tolist() == [30, 10, 20]


def test_by_says_which_row_of_the_weight_each_one_is() -> None:
    layout = Layout(
        Rebuild.parse("o i = a[p i] | b[q i] over o = p q by order"), (("o", 3), ("i", 1), ("p", 2), ("q", 1))
    )
    factors = {"a": torch.tensor([[10.0], [20.0]]), "b": torch.tensor([[30.0]]), "order": torch.tensor([2, 0, 1])}
    assert rebuild(factors, layout).flatten().tolist() == [20, 30, 10]


def test_a_sum_adds_its_pieces() -> None:
    layout = Layout(Rebuild.parse(SUM), (("o", 2), ("i", 2), ("r", 1)))
    factors = {"base": torch.eye(2), "u": torch.tensor([[1.0], [2.0]]), "v": torch.tensor([[3.0, 4.0]])}
    assert rebuild(factors, layout).tolist() == [[4, 4], [6, 9]]


def test_layouts_print_as_equation_and_sizes(golden: Callable[[str], None]) -> None:
    axes = {"o": 12, "i": 8}
    texts = []
    for name in ("svd", "pivoted"):
        d = decompositions.get(name)
        for variant in d.equations:
            layout = d.layout(axes, {"r": 3}, variant)
            texts.append(f"{name} {variant or '-'}: {layout}\n  {layout.shapes}\n  {layout.params} numbers")
    golden("\n".join(texts))
