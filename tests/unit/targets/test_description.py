"""Descriptions of machines: what a file says is what the target has, and what is wrong in it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import tdc
from tdc import targets
from tdc.errors import OptionError, TargetError
from tdc.ir import Block, Decline, OpKind
from tdc.ir.machine import SOURCES, Figure, Machine
from tdc.planning.path import contraction_paths
from tdc.targets._described import Described
from tdc.targets._description import read

SHIPPED = Path(targets.__file__).parent
TEXT = (SHIPPED / "near-memory-sketch.toml").read_text(encoding="utf-8")
BANDWIDTH = 'bandwidth = { value = 2.5e10, unit = "B/s", source = "assumed" }'


def described(folder: Path, text: str) -> Path:
    path = folder / "board.tdc-target.toml"
    path.write_text(text, encoding="utf-8")
    return path


def figures(value: object) -> Iterator[Figure]:
    if isinstance(value, Figure):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from figures(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from figures(getattr(value, field.name))


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    machine = read(described(tmp_path, TEXT))
    assert (machine.id, machine.kind) == ("near-memory-sketch", "imc")
    assert [(m.name, m.bytes.value, m.bandwidth.value) for m in machine.memory] == [
        ("SRAM", 2097152, 2.0e11),
        ("DRAM", 8589934592, 2.5e10),
    ]
    assert [step.value for step in machine.computes("float32").tile] == [1, 256, 256]
    assert machine.bandwidth(1e6) == 2.0e11
    assert machine.bandwidth(1e7) == machine.bandwidth(1e99) == 2.5e10
    assert machine.operators == ("Add", "Conv", "Gemm", "MatMul", "Reshape", "Transpose")


@pytest.mark.parametrize("name", targets.described())
def test_every_number_that_comes_with_tdc_has_a_source(name: str) -> None:
    machine = targets.get(name).machine
    assert isinstance(machine, Machine)
    found = list(figures(machine))
    assert len(found) >= 13
    assert all(figure.source in SOURCES and figure.value > 0 for figure in found)
    assert not any(figure.source == "measured" for figure in found), "nothing of these files was measured"


def test_the_digest_is_of_what_is_said_and_not_of_how(tmp_path: Path) -> None:
    first = read(described(tmp_path, TEXT))
    same = read(described(tmp_path, "# another comment\n" + TEXT.replace("2.5e10", "25000000000.0")))
    other = read(described(tmp_path, TEXT.replace("2.5e10", "2.6e10")))
    assert first.digest == same.digest != other.digest


WRONG = {
    "unknown key": (TEXT + "\n[extra]\n", "extra is no key"),
    "unknown key inside": (TEXT.replace("[ranks]", "[ranks]\nmost = 3"), "ranks.most is no key"),
    "key of a figure": (
        TEXT.replace(BANDWIDTH, BANDWIDTH.replace("unit", "units")),
        "bandwidth.units is no key",
    ),
    "nan": (TEXT.replace("2.5e10", "nan"), "memory[1].bandwidth.value must be a finite number above 0; got nan"),
    "infinite": (TEXT.replace("2.5e10", "inf"), "memory[1].bandwidth.value must be a finite number"),
    "huge": (TEXT.replace("2.5e10", "1" + "0" * 400), "memory[1].bandwidth.value must be a finite number"),
    "negative": (TEXT.replace("2.5e10", "-1.0"), "memory[1].bandwidth.value must be a finite number above 0; got -1"),
    "zero": (TEXT.replace("2.5e10", "0"), "memory[1].bandwidth.value must be a finite number above 0; got 0"),
    "boolean": (TEXT.replace("2.5e10", "true"), "memory[1].bandwidth.value must be a number"),
    "text": (TEXT.replace("2.5e10", '"fast"'), "memory[1].bandwidth.value must be a number; got 'fast'"),
    "bare number": (TEXT.replace(BANDWIDTH, "bandwidth = 1.0"), "memory[1].bandwidth must be { value"),
    "unit": (TEXT.replace(BANDWIDTH, BANDWIDTH.replace("B/s", "GB/s")), "memory[1].bandwidth.unit must be 'B/s'"),
    "source": (
        TEXT.replace(BANDWIDTH, BANDWIDTH.replace("assumed", "guess")),
        "bandwidth.source must be one",
    ),
    "no source": (
        TEXT.replace(BANDWIDTH, BANDWIDTH.replace(', source = "assumed"', "")),
        "source is missing",
    ),
    "smaller outside": (TEXT.replace("8589934592", "1024"), "memory[1].bytes must be more than the 2.097e+06 B"),
    "faster outside": (TEXT.replace("2.5e10", "3.0e11"), "memory[1].bandwidth must be no more than the 2e+11 B/s"),
    "overlap": (TEXT.replace("value = 0.5", "value = 1.5"), "overhead.overlap.value must be at most 1"),
    "half a rank": (TEXT.replace("value = 64", "value = 6.5"), "ranks.least.value must be a whole number"),
    "dtype": (TEXT.replace("[compute.float32]", "[compute.float31]"), "compute.float31 is no dtype"),
    "schema": (TEXT.replace("tdc-target/1", "tdc-target/2"), "schema must be 'tdc-target/1'"),
    "id": (TEXT.replace('"near-memory-sketch"', '"a b"'), "id must be letters"),
    "kind": (TEXT.replace('"imc"', '"abacus"'), "kind must be one of"),
    "operators": (TEXT.replace('supported = ["Add", ', "supported = [3, "), "operators.supported must be a list"),
    "table twice": (TEXT + "\n[ranks]\n", "is not TOML"),
    "no table": ("ranks = 3\n" + TEXT.replace("[ranks]", "[other]"), "other is no key"),
    "empty": ("", "schema is missing"),
    "deep": ("a = " + "[" * 5000 + "]" * 5000, "is not TOML"),
    "large": (TEXT + "#" * (1 << 20), "has more than"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_file_and_key(tmp_path: Path, name: str) -> None:
    text, message = WRONG[name]
    path = described(tmp_path, text)
    with pytest.raises(TargetError) as caught:
        targets.get(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"none\.toml cannot be read"):
        targets.get(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match=r"bytes\.toml is not TOML"):
        targets.get(str(tmp_path / "bytes.toml"))
    with pytest.raises(TargetError, match="cannot be read"):
        targets.get("a\0b.toml")


def test_a_target_is_found_by_name_by_path_and_as_a_plan_names_it(tmp_path: Path) -> None:
    shipped = targets.get("near-memory-sketch")
    own = targets.get(str(described(tmp_path, TEXT.replace('"near-memory-sketch"', '"board"'))))
    assert shipped.name == f"near-memory-sketch@{shipped.machine.digest[:12]}"  # type: ignore[union-attr]
    assert targets.get(shipped.name) is shipped
    assert targets.get(own.name).name == own.name, "of a file that is gone the name is left"
    with pytest.raises(OptionError, match=r"unknown target 'abacus'\. Known: auto, cpu, generic-cpu"):
        targets.get("abacus")
    assert set(targets.described()) >= {"generic-cpu", "near-memory-sketch", "nvidia-h200"}


def test_ranks_are_those_that_suit_the_machine() -> None:
    machine = targets.get("near-memory-sketch")
    assert (machine.rank_step(4096), machine.rank_step(1024), machine.rank_step(5)) == (256, 128, 1)
    assert all(full >= 8 * machine.rank_step(full) for full in range(8, 5000, 7))


def test_a_machine_without_an_operator_declines_what_needs_it() -> None:
    machine, cpu = targets.get("near-memory-sketch"), targets.get("cpu")
    axes = {"o": 64, "i": 48}
    for name, gathers in (("svd", False), ("pivoted", True)):
        decomposition = tdc.decompositions.get(name)
        variant = decomposition.variants(axes)[0]
        layout = decomposition.layout(axes, {"r": 16}, variant)
        paths = contraction_paths(OpKind.LINEAR, layout)
        block = machine.lower(OpKind.LINEAR, layout, paths)
        if gathers:
            assert isinstance(block, Decline)
            assert block.reason == "near-memory-sketch has no Gather"
        else:
            assert isinstance(block, Block)
            assert block == cpu.lower(OpKind.LINEAR, layout, paths)


def test_described_targets_lower_as_all_targets_do() -> None:
    """So that the laws of tests/contracts/test_targets.py hold for them too."""
    own = {"lower", "lower_weight", "rank_step", "orders_by_time", "_able", "__init__"}
    assert {name for name, value in vars(Described).items() if callable(value) or isinstance(value, property)} == own
