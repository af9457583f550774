"""Descriptions of machines: TOML files, ``tdc-target/1``. Every number states its unit and where it comes from.

.. code-block:: toml

    schema = "tdc-target/1"
    id = "my-board"
    kind = "cpu"                                  # or gpu, npu, imc
    summary = "one line"
    [ranks]
    multiple = { value = 8, unit = "1", source = "derived" }
    least = { value = 1, unit = "1", source = "assumed" }
    [compute.float32]                             # one table for each dtype
    peak = { value = 1.0e11, unit = "op/s", source = "datasheet", ref = "where from" }
    efficiency = { value = 0.8, unit = "1", source = "measured" }
    tile_m, tile_n, tile_k = ...                  # sizes are padded to multiples of these
    [[memory]]                                    # innermost first, the last one holds the weights
    name = "L2"
    bytes = { value = 1048576, unit = "B", source = "datasheet" }
    bandwidth = { value = 6.0e10, unit = "B/s", source = "measured" }
    [overhead]
    launch = { value = 2.0e-6, unit = "s", source = "measured" }
    overlap = { value = 0.9, unit = "1", source = "assumed" }
    [operators]
    supported = ["MatMul", "Conv"]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TargetError
from ..ir.machine import SOURCES, Compute, Figure, Machine, Memory

__all__ = ["ENDING", "read"]

ENDING = ".toml"
_SCHEMA = "tdc-target/1"
_KINDS = ("cpu", "gpu", "npu", "imc")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
_LARGEST = 1 << 20
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")
_TILES = ("tile_m", "tile_n", "tile_k")


def read(path: str | Path) -> Machine:
    """The description in a file. Raises TargetError, which names the file and the key."""
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise TargetError(f"the target description {name[:200]} cannot be read: {error}") from error
    if len(data) > _LARGEST:
        raise TargetError(f"the target description {name} has more than {_LARGEST} bytes")
    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"the target description {name} is not TOML: {error}") from error
    return _Reader(name).machine(tree)


@dataclass(frozen=True)
class _Reader:
    """Checks what a file says; every failure names the file and the key."""

    file: str

    def fail(self, key: str, reason: str) -> TargetError:
        return TargetError(f"{self.file}: {key} {reason}")

    def machine(self, tree: Mapping[str, Any]) -> Machine:
        wanted = ("schema", "id", "kind", "summary", "ranks", "compute", "memory", "overhead", "operators")
        self.keys("", tree, wanted)
        if tree["schema"] != _SCHEMA:
            raise self.fail("schema", f"must be {_SCHEMA!r}; got {tree['schema']!r}")
        if not isinstance(tree["id"], str) or not _ID.fullmatch(tree["id"]):
            raise self.fail("id", f"must be letters, digits and . _ / - (64 at most); got {str(tree['id'])[:80]!r}")
        if tree["kind"] not in _KINDS:
            raise self.fail("kind", f"must be one of {', '.join(_KINDS)}; got {tree['kind']!r}")
        if not isinstance(tree["summary"], str) or not tree["summary"].strip():
            raise self.fail("summary", "must be a text")
        ranks = self.table("ranks", tree["ranks"], ("multiple", "least"))
        overhead = self.table("overhead", tree["overhead"], ("launch", "overlap"))
        operators = self.table("operators", tree["operators"], ("supported",))["supported"]
        if not isinstance(operators, list) or not operators or not all(isinstance(o, str) and o for o in operators):
            raise self.fail("operators.supported", "must be a list of names of ONNX operators")
        return Machine(
            id=tree["id"],
            kind=tree["kind"],
            summary=tree["summary"].strip(),
            rank_multiple=self.whole("ranks.multiple", ranks["multiple"]),
            min_rank=self.whole("ranks.least", ranks["least"]),
            compute=self.compute(tree["compute"]),
            memory=self.memory(tree["memory"]),
            launch=self.figure("overhead.launch", overhead["launch"], "s"),
            overlap=self.part("overhead.overlap", overhead["overlap"]),
            operators=tuple(sorted(set(operators))),
            digest=hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest(),
        )

    def compute(self, given: Any) -> tuple[Compute, ...]:
        if not isinstance(given, dict) or not given:
            raise self.fail("compute", "must have a table for at least one dtype, [compute.float32]")
        found = []
        for dtype, own in given.items():
            key = f"compute.{dtype}"
            if dtype not in _DTYPES:
                raise self.fail(key, f"is no dtype. Known: {', '.join(_DTYPES)}")
            self.table(key, own, ("peak", "efficiency", *_TILES))
            peak = self.figure(f"{key}.peak", own["peak"], "op/s")
            m, n, k = (self.whole(f"{key}.{name}", own[name]) for name in _TILES)
            found.append(Compute(dtype, peak, self.part(f"{key}.efficiency", own["efficiency"]), (m, n, k)))
        return tuple(found)

    def memory(self, given: Any) -> tuple[Memory, ...]:
        if not isinstance(given, list) or not given:
            raise self.fail("memory", "must have at least one level, [[memory]]")
        levels: list[Memory] = []
        for place, own in enumerate(given):
            key = f"memory[{place}]"
            self.table(key, own, ("name", "bytes", "bandwidth"))
            if not isinstance(own["name"], str) or not own["name"]:
                raise self.fail(f"{key}.name", "must be a text")
            size = self.figure(f"{key}.bytes", own["bytes"], "B")
            levels.append(Memory(own["name"], size, self.figure(f"{key}.bandwidth", own["bandwidth"], "B/s")))
        for place, (inner, outer) in enumerate(itertools.pairwise(levels), 1):
            if outer.bytes.value <= inner.bytes.value:
                raise self.fail(f"memory[{place}].bytes", f"must be more than the {inner.bytes} of the level inside")
            if outer.bandwidth.value > inner.bandwidth.value:
                reason = f"must be no more than the {inner.bandwidth} of the level inside"
                raise self.fail(f"memory[{place}].bandwidth", reason)
        return tuple(levels)

    def figure(self, key: str, given: Any, unit: str) -> Figure:
        if not isinstance(given, dict):
            raise self.fail(key, f'must be {{ value = ..., unit = "{unit}", source = "..." }}; got {str(given)[:40]}')
        self.keys(key, given, ("value", "unit", "source"), ("ref",))
        value = given["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(f"{key}.value", f"must be a number; got {str(value)[:40]!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not 0 < number < math.inf:
            raise self.fail(f"{key}.value", f"must be a finite number above 0; got {number:g}")
        if given["unit"] != unit:
            raise self.fail(f"{key}.unit", f"must be {unit!r}; got {given['unit']!r}")
        if given["source"] not in SOURCES:
            raise self.fail(f"{key}.source", f"must be one of {', '.join(SOURCES)}; got {given['source']!r}")
        if not isinstance(given.get("ref", ""), str):
            raise self.fail(f"{key}.ref", "must be a text")
        return Figure(number, unit, given["source"], given.get("ref", ""))

    def part(self, key: str, given: Any) -> Figure:
        found = self.figure(key, given, "1")
        if found.value > 1:
            raise self.fail(f"{key}.value", f"must be at most 1; got {found.value:g}")
        return found

    def whole(self, key: str, given: Any) -> Figure:
        found = self.figure(key, given, "1")
        if found.value != int(found.value):
            raise self.fail(f"{key}.value", f"must be a whole number; got {found.value:g}")
        return found

    def table(self, key: str, given: Any, wanted: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(given, dict):
            raise self.fail(key, "must be a table")
        self.keys(key, given, wanted)
        return given

    def keys(self, key: str, given: Mapping[str, Any], wanted: Sequence[str], more: Sequence[str] = ()) -> None:
        inside = f"{key}." if key else ""
        for name in given:
            if name not in (*wanted, *more):
                raise self.fail(f"{inside}{name}"[:80], f"is no key. Known: {', '.join((*wanted, *more))}")
        for name in wanted:
            if name not in given:
                raise self.fail(f"{inside}{name}", "is missing")
