"""The command ``tdc`` on real files, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import tdc
from tdc.__main__ import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A two-layer perceptron as a file, with its calibration data beside it."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> mlp (float[n, 64] x) => (float[n, 32] y) '
        "{ h = MatMul(x, first)  a = Relu(h)  y = Gemm <transB = 1> (a, second, bias) }"
    )
    weights = {"first": (64, 96), "second": (32, 96), "bias": (32,)}
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(graph, tmp_path / "mlp.onnx")
    mixing = rng.standard_normal((64, 64)) * np.linspace(1, 0.01, 64)
    np.savez(tmp_path / "data.npz", x=(rng.standard_normal((256, 64)) @ mixing).astype(np.float32))
    return tmp_path / "mlp.onnx"


def test_calibrate_plan_compress_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    stats, plan, out = (str(folder / name) for name in ("stats.safetensors", "plan.json", "small.onnx"))
    assert main(["calibrate", str(model), str(folder / "data.npz"), "-o", stats, "--quiet"]) == 0
    assert main(["plan", str(model), "--budget", "params=0.6", "--statistics", stats, "-o", plan, "--quiet"]) == 0
    assert "of 2 candidate sites replaced" in capsys.readouterr().out
    assert main(["plan", str(model), "--budget", "params=0.6", "--statistics", stats, "--explain", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "loss + price" in told
    assert told.count("\n* ") == 2
    data = str(folder / "data.npz")
    assert main(["plan", str(model), "--budget", "loss=0.05", "--calibration", data, "--quiet"]) == 0
    assert "plans were measured" in capsys.readouterr().out
    assert main(["compress", str(model), out, "--plan", plan, "--statistics", stats, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kept = sum(site["after"]["params"] for site in report["sites"])
    assert kept <= 0.6 * sum(site["before"]["params"] for site in report["sites"])
    x = np.load(folder / "data.npz")["x"]
    dense, small = (onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for path in (model, out))
    assert np.square(small - dense).sum() < 0.2 * np.square(dense).sum()


def test_what_goes_wrong_is_one_line_and_a_status(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    before = sorted(p.name for p in folder.iterdir())
    (folder / "broken.onnx").write_bytes(model.read_bytes()[:100])
    wrong = {
        "cannot be reached; the nearest": ["compress", str(model), str(folder / "o.onnx"), "--budget", "params=0.001"],
        "params=0.5": ["compress", str(model), str(folder / "o.onnx"), "--budget", "0.5"],
        "is the input file": ["compress", str(model), str(model), "--budget", "params=0.5"],
        "does not exist": ["compress", str(model), str(folder / "no" / "o.onnx"), "--budget", "params=0.5"],
        "did you mean 'pivoted'": ["plan", str(model), "--budget", "params=0.5", "--allow", "pivotd"],
        "broken.onnx": ["compress", str(folder / "broken.onnx"), str(folder / "o.onnx"), "--budget", "params=0.5"],
        "was not made by TDC": ["report", str(model)],
        "no calibration data": ["plan", str(model), "--budget", "params=0.5", "--calibration", str(folder / "none")],
    }
    for words, arguments in wrong.items():
        status = main([*arguments, "--quiet"] if arguments[0] != "report" else arguments)
        printed = capsys.readouterr()
        assert status in (2, 6), arguments
        assert words in printed.err, (words, printed.err)
        assert "Traceback" not in printed.err
    (folder / "broken.onnx").unlink()
    assert sorted(p.name for p in folder.iterdir()) == before


def test_wrong_calibration_names_the_input(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(model.parent / "wrong.npz", x=np.zeros((8, 63), np.float32))
    arguments = [
        "plan",
        str(model),
        "--budget",
        "params=0.5",
        "--calibration",
        str(model.parent / "wrong.npz"),
        "--quiet",
    ]
    assert main(arguments) == 2
    assert "x" in capsys.readouterr().err


def test_lists_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for what, name in (("decompositions", "pivoted"), ("targets", "cpu"), ("passes", "rewrite-graph")):
        assert main(["list", what]) == 0
        assert name in capsys.readouterr().out


def test_the_same_command_twice_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    data, files = str(model.parent / "data.npz"), []
    for name in ("one.onnx", "two.onnx"):
        command = [sys.executable, "-P", "-m", "tdc", "compress", str(model), str(tmp_path / name)]
        command += ["--budget", "params=0.5", "--calibration", data, "--quiet"]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert tdc.report(tmp_path / "one.onnx").replaced == 2
