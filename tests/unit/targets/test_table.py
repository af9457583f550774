"""Tables of times: kept and read again, refused on another machine, and never half there."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from tdc import targets
from tdc.errors import DestinationError, OptionError, TargetError
from tdc.ir import Decline
from tdc.ir.machine import Table, Timing, Work
from tdc.targets import _table
from tdc.targets._measure import measure


def small(**changes: object) -> Table:
    timings = {
        Work("launch", ()): Timing(1e-6, 2e-6),
        Work("gemm", (1.0, 8.0, 8.0)): Timing(1e-6, 1.5e-6),
        Work("gemm", (1024.0, 512.0, 512.0)): Timing(6e-3, 7e-3),
    }
    table = Table(_table.fingerprint(), timings, "2026-11-26", 0.01)
    return dataclasses.replace(table, **changes)  # type: ignore[arg-type]


def contents(table: Table) -> tuple[object, ...]:
    return table.fingerprint, table.timings, table.date, table.drift, table.noisy, table.left_out, table.key


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "tdc" / "targets"
    monkeypatch.setattr("tdc.targets._table.folder", lambda: folder)
    return folder


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = small(noisy=True, left_out=3)
    path = _table.save(table, tmp_path / "t.json")
    assert contents(_table.load(path)) == contents(table)


def test_the_folder_follows_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _table.folder() == tmp_path / "tdc" / "targets"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _table.folder() == tmp_path / "home" / ".cache" / "tdc" / "targets"


def test_the_table_of_this_machine_is_found_and_the_processor_has_it(home: Path) -> None:
    assert _table.found() is None
    assert targets.get("auto").table is None
    path = _table.save(small())
    assert path.parent == home
    assert path.parent.stat().st_mode & 0o777 == 0o700
    table = targets.get("auto").table
    assert table is not None
    assert contents(table) == contents(small())
    assert targets.get("auto") is targets.get("cpu")
    assert targets.get("auto").orders_by_time


def test_another_number_of_threads_is_another_machine(home: Path) -> None:
    other = {**_table.fingerprint(), "threads": "77"}
    path = _table.save(small(fingerprint=other))
    with pytest.raises(TargetError, match=r"of another machine: threads '77', here '\d+'"):
        targets.get(str(path))
    machine = targets.get("auto")
    assert machine.table is None
    assert "not for this machine as it is now: threads '77'" in machine.remark


def test_a_table_by_its_path(tmp_path: Path) -> None:
    path = _table.save(small(), tmp_path / "t.json")
    machine = targets.get(str(path))
    assert machine.name == "cpu"
    assert machine.table is not None
    assert contents(machine.table) == contents(small())


def test_a_table_with_the_name_of_this_machine_but_of_another_one(home: Path) -> None:
    path = _table.save(small())
    text = path.read_text(encoding="utf-8").replace('"schema": "1"', '"schema": "0"')
    path.write_text(text, encoding="utf-8")
    found = _table.found()
    assert isinstance(found, Decline)
    assert "schema '0', here '1'" in found.reason


def broken() -> dict[str, str]:
    text = _table.to_json(small())
    data = json.loads(text)

    def having(**changes: object) -> str:
        return json.dumps({**data, **changes})

    return {
        "cut off": text[: len(text) // 2],
        "empty": "",
        "not a table": "[1, 2]",
        "another version": having(version=2),
        "unknown key": having(more=1),
        "no timings": having(timings=[]),
        "nan": text.replace("1e-06, 2e-06", "NaN, 2e-06"),
        "negative": having(timings=[["launch", "float32", [], -1e-6, 1e-6]]),
        "zero": having(timings=[["launch", "float32", [], 0, 1e-6]]),
        "median below the least": having(timings=[["launch", "float32", [], 2e-6, 1e-6]]),
        "sizes": having(timings=[["gemm", "float32", [1, -8, 8], 1e-6, 1e-6]]),
        "kind": having(timings=[[3, "float32", [], 1e-6, 1e-6]]),
        "row": having(timings=[["launch"]]),
        "boolean": having(timings=[["launch", "float32", [], True, 1]]),
        "drift": having(drift="much"),
        "fingerprint": having(fingerprint=3),
        "deep": "[" * 100_000,
    }


@pytest.mark.parametrize("name", broken())
def test_a_broken_table_is_a_typed_error_by_path_and_a_remark_otherwise(home: Path, name: str) -> None:
    path = _table.save(small())
    path.write_text(broken()[name], encoding="utf-8")
    with pytest.raises(TargetError, match=path.name):
        targets.get(str(path))
    machine = targets.get("auto")
    assert machine.table is None
    assert "tdc target measure" in machine.remark


def test_no_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("none.json", "pipe.json", "folder.json"):
        with pytest.raises(TargetError, match=name):
            targets.get(str(tmp_path / name))


def test_nothing_is_kept_where_others_may_write_or_read(home: Path) -> None:
    home.mkdir(parents=True)
    home.chmod(0o755)
    with pytest.raises(DestinationError, match="not yours alone"):
        _table.save(small())
    assert list(home.iterdir()) == []
    assert "others may write there" in targets.get("auto").remark


def test_a_write_that_fails_leaves_the_old_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _table.save(small())
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(DestinationError):
        _table.save(small(drift=0.02))
    assert [p.read_bytes() for p in home.iterdir()] == [before]


def test_a_short_measurement_has_what_the_model_needs() -> None:
    usual = torch.get_num_threads()
    table = measure(0.3, 1)
    assert torch.get_num_threads() == usual
    assert table.fingerprint["threads"] == "1"
    kinds = {work.kind for work in table.timings}
    assert kinds >= {"launch", "copy", "gemm"}
    assert all(0 < t.least <= t.median < 10 for t in table.timings.values())
    assert table.left_out > 1000, "a third of a second is not enough for the grids"


@pytest.mark.parametrize(("seconds", "threads"), [(0, None), (-1, None), (float("nan"), None), (1, 0)])
def test_numbers_that_make_no_sense_are_refused(seconds: float, threads: int | None) -> None:
    with pytest.raises(OptionError):
        measure(seconds, threads)
