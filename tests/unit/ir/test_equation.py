from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc.ir import Equation, Term
from tdc.testing import assert_close

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True)


@st.composite
def terms(draw: st.DrawFn, pool: list[str]) -> Term:
    axes = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=5, unique=True))
    groups: list[tuple[str, ...]] = []
    while axes:
        size = draw(st.integers(1, len(axes)))
        groups.append(tuple(axes[:size]))
        axes = axes[size:]
    return Term(tuple(groups))


@st.composite
def equations(draw: st.DrawFn) -> Equation:
    pool = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    inputs = tuple(draw(st.lists(terms(pool), min_size=1, max_size=4)))
    known = list(dict.fromkeys(axis for term in inputs for axis in term.axes))
    return Equation(inputs, draw(terms(known)))


@given(equations())
def test_printing_and_parsing_is_the_identity(equation: Equation) -> None:
    assert Equation.parse(str(equation)) == equation


@given(equations(), st.data())
def test_shapes_macs_and_contracted_axes_follow_from_the_sizes(equation: Equation, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 4)) for axis in equation.axes}
    for term, shape in zip(equation.inputs, equation.shapes(sizes), strict=True):
        assert len(shape) == len(term.groups)
        assert np.prod(shape) == np.prod([sizes[axis] for axis in term.axes])
    summed = np.prod([sizes[axis] for axis in equation.contracted], dtype=int)
    assert equation.macs(sizes) == np.prod([sizes[axis] for axis in equation.output.axes], dtype=int) * summed
    assert set(equation.contracted) | set(equation.output.axes) == set(equation.axes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "an equation is written"),
        ("-> a", "an equation is written"),
        ("a b -> c", r"output axes \['c'\]"),
        ("a (b (c)) -> a", "nested"),
        ("a (b -> a", "unclosed"),
        ("a b) -> a", "unopened"),
        ("a () -> a", "empty"),
        ("a a -> a", "named twice"),
        ("A b -> b", "cannot read"),
        ("a.b -> a", "cannot read"),
    ],
)
def test_what_is_no_equation_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Equation.parse(text)


@pytest.mark.parametrize(
    ("dense", "rebuild"),
    [
        ("b i, o i -> b o", "o r, r i -> o i"),
        ("b i, o i -> b o", "o b, b i -> o i"),
        ("r i, o i -> r o", "o r, r s, s i -> o i"),
        ("b c, c d -> b d", "c d -> c d"),
    ],
)
@given(seed=st.integers(0, 50))
@settings(max_examples=10)
def test_substituting_is_multiplying_by_the_rebuilt_operand(dense: str, rebuild: str, seed: int) -> None:
    whole, inner = Equation.parse(dense), Equation.parse(rebuild)
    both = whole.substitute(1, inner)
    generator = torch.Generator().manual_seed(seed)
    sizes = {axis: int(torch.randint(2, 5, (), generator=generator)) for axis in both.axes}
    arrays = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in both.shapes(sizes)]
    rebuilt = torch.einsum(inner.subscripts(), *arrays[1:])
    expected = torch.einsum(whole.subscripts(), arrays[0], rebuilt)
    assert_close(torch.einsum(both.subscripts(), *arrays), expected, 1e-12)


def test_a_rank_with_the_name_of_an_axis_is_renamed() -> None:
    dense = Equation.parse("b i, o i -> b o")
    assert str(dense.substitute(1, Equation.parse("o b, b i -> o i"))) == "b i, o b_, b_ i -> b o"


def test_a_rebuild_of_another_operand_is_refused() -> None:
    with pytest.raises(ValueError, match="does not rebuild operand"):
        Equation.parse("b i, o i -> b o").substitute(1, Equation.parse("i r, r o -> i o"))


def test_groups_are_one_stored_axis() -> None:
    equation = Equation.parse("o0 r, o1 r -> (o0 o1) r")
    assert equation.output.shape({"o0": 3, "o1": 4, "r": 2}) == (12, 2)
    assert equation.subscripts() == "ab,cb->acb"


def test_more_axes_than_letters_are_refused() -> None:
    axes = " ".join(f"a{k}" for k in range(53))
    with pytest.raises(ValueError, match="more than 52 axes"):
        Equation.parse(f"{axes} -> a0").subscripts()
