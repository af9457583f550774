"""``tdc target`` as a user runs it, and ``tdc plan`` with what it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from tdc import targets
from tdc.__main__ import main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "tdc" / "targets"
    monkeypatch.setattr("tdc.targets._table.folder", lambda: folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> net (float[n, 64] x) => (float[n, 96] y) { y = MatMul(x, w) }'
    )
    values = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(graph, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_list_and_show(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["target", "list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("auto", "cpu", "nvidia-h200", "near-memory-sketch"))
    assert "no times of this machine; 'tdc target measure' takes them" in told
    for name in (*targets.names(), *targets.described(), str(Path(targets.__file__).with_name("nvidia-h200.toml"))):
        assert main(["target", "show", name]) == 0
        told = capsys.readouterr().out
        assert "op/s (" in told
        assert "B/s (" in told
    assert "4.8e+12 B/s (datasheet: 4.8 TB/s)" in told


def test_measure_then_show_then_plan(home: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["target", "measure", "--seconds", "0.3", "--quiet"]) == 0
    told = capsys.readouterr().out
    (path,) = home.iterdir()
    assert f"written: {path}" in told
    assert "launch" in told
    assert main(["target", "show", "cpu"]) == 0
    assert f"table {path.stem}" in capsys.readouterr().out
    arguments = ["plan", str(model), "--budget", "params=0.6", "--paths", "--quiet"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert f"table {path.stem}" in told
    assert "by the times of this machine" in told
    assert "w, linear 96x64: " in told
    assert "multiply-adds" in told
    assert main([*arguments, "--target", "nvidia-h200"]) == 0
    told = capsys.readouterr().out
    assert "target nvidia-h200@" in told
    assert "by the description nvidia-h200" in told
    other = str(path.parent / "other.json")
    Path(other).write_text(path.read_text(encoding="utf-8").replace('"threads": "', '"threads": "9'), encoding="utf-8")
    assert main([*arguments, "--target", other]) == 2
    assert "is of another machine: threads '9" in capsys.readouterr().err


def test_a_table_goes_where_it_is_told(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "mine.json"
    assert main(["target", "measure", "--seconds", "0.1", "--threads", "1", "--quiet", "-o", str(where)]) == 0
    assert not home.exists()
    assert where.exists()
    assert "threads: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "abacus"], 2, "unknown target 'abacus'"),
        (["show", "none.toml"], 2, "none.toml cannot be read"),
        (["measure", "--seconds", "-3"], 2, "seconds must be above 0"),
        (["measure", "--threads", "0"], 2, "threads must be at least 1"),
        (["measure", "-o", "/nonexistent/t.json"], 6, "does not exist"),
    ],
)
def test_refusals(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["target", *arguments]) == status
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_the_users_alone_is_refused_before_the_work(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir(parents=True)
    home.chmod(0o777)
    assert main(["target", "measure", "--seconds", "1000"]) == 6
    assert "not yours alone" in capsys.readouterr().err
