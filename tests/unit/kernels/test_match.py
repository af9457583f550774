from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tdc import decompositions, kernels, targets
from tdc.ir import Block, Decline, Equation, Layout, Op, OpKind
from tdc.ir.block import without_gather
from tdc.kernels import Match
from tdc.kernels.base import Line
from tdc.planning.path import contraction_paths
from tdc.testing import applicable, random_factors, run_block, variants_of

AXES = {"o": 24, "i": 20}
RANK = 7
SIZES = (("o", 24), ("i", 20), ("r", 7))
INNER, OUTER = Equation.parse("b i, r i -> b r"), Equation.parse("b r, o r -> b o")
FIRST, SECOND = Op("matmul", "t0", ("x", "v"), INNER), Op("matmul", "t1", ("t0", "u"), OUTER)
PLAIN = Block((("v", (7, 20)), ("u", (24, 7))), (FIRST, SECOND), "t1", SIZES)


def blocks() -> dict[str, tuple[Layout, Block]]:
    """Every decomposition of a linear weight that runs as a straight line, and those whose last gather is folded."""
    found = {}
    for name in applicable(AXES):
        d = decompositions.get(name)
        for variant in variants_of(name, AXES):
            ranks = {axis: min(RANK, rank) for axis, rank in d.full_ranks(AXES, variant).items()}
            layout = d.layout(AXES, ranks, variant)
            block = targets.get("cpu").lower(OpKind.LINEAR, layout, contraction_paths(OpKind.LINEAR, layout))
            if isinstance(block, Block):
                label = f"{name} {variant}".strip()
                found[label] = layout, block
                if block.ops[-1].kind == "take":
                    found[f"{label}, folded"] = layout, without_gather(block)
    return found


@pytest.mark.usefixtures("compiled")
def test_blocks_have_kernels_by_their_structure(golden: Callable[[str], None]) -> None:
    lines = []
    for label, (_, block) in blocks().items():
        found = kernels.match(block)
        lines.append(f"{label}: {found.kernel.name if isinstance(found, Match) else '-'}")
    golden("\n".join(sorted(lines)))


@pytest.mark.usefixtures("compiled")
def test_a_kernel_computes_what_its_block_states() -> None:
    matched = set()
    for layout, block in blocks().values():
        found = kernels.match(block)
        if isinstance(found, Match):
            matched.add(found.kernel.name)
            orders = {pivot.index: torch.randperm(AXES[pivot.split]) for pivot in layout.rebuild.pivots.values()}
            factors = random_factors(layout) | orders
            x = torch.randn(3, AXES["i"], dtype=torch.float64)
            right = run_block(block, factors, x)
            real = {k: t.float() if t.is_floating_point() else t.int() for k, t in factors.items()}
            bias = torch.randn(AXES["o"])
            for call in (found, found.run, found.reference):
                torch.testing.assert_close(call(x.float(), real), right.float(), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(call(x.float(), real, bias), (right + bias).float(), rtol=1e-4, atol=1e-4)
    here = {k.name for k in kernels.kernels() if k.device == "cpu" and not k.kind.is_conv}
    assert matched == here - {"one product", "one product behind a gather"}


@pytest.mark.usefixtures("compiled")
def test_names_of_values_factors_and_axes_do_not_count() -> None:
    first = Op("matmul", "h", ("given", "a"), Equation.parse("b i, k i -> b k"))
    second = Op("matmul", "y", ("h", "b"), Equation.parse("b k, o k -> b o"))
    sizes = (("o", 24), ("i", 20), ("k", 7))
    found = kernels.match(Block((("a", (7, 20)), ("b", (24, 7))), (first, second), "y", sizes, input="given"))
    assert isinstance(found, Match)
    assert (found.factors, dict(found.sizes)) == (("a", "b"), {"0": 0, "i": 20, "o": 24, "r": 7})


def other(**changes: object) -> Block:
    return replace(PLAIN, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (other(kind=OpKind.CONV2D), "two products: for matrix products, not for conv2d"),
        (other(ops=(FIRST, FIRST, SECOND)), "two products: runs matmul, matmul; the block matmul, matmul, matmul"),
        (other(ops=(FIRST, replace(SECOND, inputs=("t0", "v")))), "t1 = matmul(t0, v)"),
        (other(ops=(FIRST, replace(SECOND, inputs=("x", "u")))), "t1 = matmul(x, u)"),
        (other(ops=(FIRST, replace(SECOND, equation=Equation.parse("b r, r o -> b o")))), "has another equation"),
        (other(ops=(FIRST, replace(SECOND, equation=Equation.parse("b r, (o p) r -> b o p")))), "another equation"),
        (other(ops=(FIRST, replace(SECOND, equation=None))), "has another equation"),
        (other(output="t0"), "the block gives t0"),
        (other(factors=PLAIN.factors[:1]), "u is no factor"),
    ],
)
def test_another_structure_is_declined_with_the_reason(block: Block, reason: str) -> None:
    found = kernels.match(block)
    assert isinstance(found, Decline)
    assert found.reason.startswith("no kernel: ")
    assert reason in found.reason


def test_other_entries_of_a_gather_are_declined() -> None:
    layout = next(layout for layout, block in blocks().values() if block.ops[0].kind == "take")
    block = targets.get("cpu").lower(OpKind.LINEAR, layout, contraction_paths(OpKind.LINEAR, layout))
    assert isinstance(block, Block)
    shifted = replace(block, ops=(replace(block.ops[0], stop=block.ops[0].stop - 1), *block.ops[1:]))
    found = kernels.match(shifted)
    assert isinstance(found, Decline)
    assert "takes other entries" in found.reason


def test_where_the_code_cannot_run_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tuple(replace(kernel, available=lambda: Decline("no C compiler")) for kernel in kernels.kernels())
    monkeypatch.setattr("tdc.kernels.registry.kernels", lambda: missing)
    assert kernels.match(PLAIN) == Decline("no C compiler")


def test_every_kernel_of_the_processor_has_one_for_the_same_equation_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = "one product behind a gather"  # on the GPU the product and the gather run one after the other
    linear = [kernel for kernel in kernels.kernels() if not kernel.kind.is_conv and kernel.name != alone]
    of = {device: [kernel for kernel in linear if kernel.device == device] for device in ("cpu", "cuda")}
    assert [k.lines for k in of["cpu"]] == [k.lines for k in of["cuda"]]
    everywhere = tuple(replace(kernel, available=lambda: None) for kernel in kernels.kernels())
    monkeypatch.setattr("tdc.kernels.registry.kernels", lambda: everywhere)
    for _, block in blocks().values():
        found = [kernels.match(block, device) for device in ("cpu", "cuda")]
        if isinstance(found[0], Match):
            assert isinstance(found[1], Match)
            assert found[0].factors == found[1].factors
            assert found[1].kernel.device == "cuda"
        else:
            assert not found[1]


def test_without_a_device_the_reason_is_given() -> None:
    found = kernels.match(PLAIN, "cuda")
    if torch.cuda.is_available():
        assert isinstance(found, Match)
    else:
        assert isinstance(found, Decline)
        assert found.reason in ("triton is not installed", "no CUDA device")
    assert kernels.match(PLAIN, "meta") == Decline("no kernel for meta")


def test_lines_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="take"):
        Line.parse("t0 = take(x, order)")


def test_every_kernel_states_what_it_computes_and_its_limits() -> None:
    names = [kernel.name for kernel in kernels.kernels()]
    assert len(set(names)) == len(names) > 0
    for kernel in kernels.kernels():
        assert kernel.lines
        assert kernel.limits
        given = {name for line in kernel.lines for name in line.inputs} - {line.output for line in kernel.lines}
        assert set(kernel.factors) == given - {"x"}
