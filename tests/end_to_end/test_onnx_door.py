"""The ONNX door and the command on what people do to them: wrong outputs, odd terminals, damaged data, odd graphs."""

from __future__ import annotations

import errno
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import tdc
from tdc.__main__ import main
from tdc.data import NpzBatches
from tdc.errors import CalibrationError, DestinationError
from tdc.frontends.onnx import file_size

HALF = ["--budget", "params=0.5", "--quiet"]
MLP = "h = MatMul(x, A)  b = Add(h, bias)  a = Relu(b)  y = MatMul(a, B)"


def save(path: Path, body: str = MLP, domain: str = "", names: dict[str, str] | None = None, **options: Any) -> Path:
    """A file with the nodes of ``body`` and random A (48, 64), B (64, 32), bias (64,)."""
    rng = np.random.default_rng(0)
    text = f'<ir_version: 8, opset_import: ["" : 18]> g (float[n, 48] x) => (float[n, 32] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, shape in {"A": (48, 64), "B": (64, 32), "bias": (64,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for old, new in (names or {}).items():
        for tensor in model.graph.initializer:
            tensor.name = new if tensor.name == old else tensor.name
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
    model.opset_import[0].domain = domain
    onnx.save(model, path, **options)
    return path


def run(path: Path) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    return y


def external(folder: Path) -> Path:
    return save(folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)


def test_the_external_data_of_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = external(tmp_path)
    before = (tmp_path / "m.data").read_bytes()
    with pytest.raises(DestinationError, match="from which the model is read"):
        tdc.compress_onnx(source, tmp_path / "m.data", budget="params=0.5", progress=False)
    assert (tmp_path / "m.data").read_bytes() == before


def test_file_sizes_count_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = external(tmp_path), tmp_path / "o.onnx"
    assert file_size(source) == source.stat().st_size + (tmp_path / "m.data").stat().st_size
    assert main(["compress", str(source), str(out), *HALF]) == 0
    assert f"files: {file_size(source):,} -> {out.stat().st_size:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "calibrate", "compress"])
def test_no_command_writes_over_what_it_reads(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, plan = save(tmp_path / "m.onnx"), tmp_path / "d.npz", tmp_path / "p.json"
    np.savez(data, x=np.ones((4, 48), np.float32))
    assert main(["plan", str(model), *HALF, "-o", str(plan)]) == 0
    wrong = {
        "plan": ["plan", str(model), *HALF, "-o", str(model)],
        "calibrate": ["calibrate", str(model), str(data), "-o", str(data), "--quiet"],
        "compress": ["compress", str(model), str(plan), "--plan", str(plan), "--quiet"],
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(wrong[command]) == 6
    assert "is the input file" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Broken(io.TextIOBase):
    """An output that takes nothing, like a closed pipe or a full disk."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "no")

    def flush(self) -> None:
        raise OSError(self.number, "no")


@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 0), (errno.ENOSPC, 6)])
def test_the_plan_is_written_although_nobody_reads_the_table(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = save(tmp_path / "m.onnx"), tmp_path / "p.json"
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main(["plan", str(model), *HALF, "-o", str(plan)]) == status
    assert tdc.compress_onnx(model, tmp_path / "o.onnx", plan=plan, progress=False).sites


def test_names_neither_break_nor_steer_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "m.onnx", names={"A": "poids \u91cd", "B": "\x1b[31mred"})
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert main(["plan", str(model), *HALF]) == 0
    assert b"poids \\u91cd" in screen.getvalue()
    assert b"\\x1b[31mred" in screen.getvalue()
    assert b"\x1b" not in screen.getvalue()


def test_standard_operators_under_their_long_domain(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", domain="ai.onnx")
    assert not any(c.is_dense for c in tdc.plan(model, budget="params=0.5", progress=False).choices)


def damaged(kind: str, path: Path) -> None:
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal((64, 48)))
    good = path.read_bytes()
    if kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif kind == "no array":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.txt", "abc")
    elif kind == "cut":
        path.write_bytes(good[: len(good) // 2])
    else:
        path.write_bytes(good[:60] + b"\xff\x55\xff\x55" + good[64:])


@pytest.mark.parametrize("kind", ["one array", "no array", "cut", "damaged"])
def test_damaged_calibration_files_are_refused(kind: str, tmp_path: Path) -> None:
    damaged(kind, tmp_path / "d.npz")
    with pytest.raises(CalibrationError, match=r"d\.npz"):
        list(NpzBatches(tmp_path / "d.npz"))


@pytest.mark.parametrize("wanted", [np.int64, np.uint64])
def test_no_index_changes_its_sign(wanted: Any, tmp_path: Path) -> None:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(wanted))
    model = save(tmp_path / "m.onnx", "e = CastLike(x, bias)  h = MatMul(e, A)  y = MatMul(h, B)")
    proto = onnx.load(model)
    proto.graph.input[0].type.tensor_type.elem_type = dtype
    onnx.save(proto, model)
    other = np.int64 if wanted is np.uint64 else np.uint64
    entries = np.full((2, 48), -1, np.int64).astype(other)
    with pytest.raises(CalibrationError, match="do not fit"):
        tdc.calibrate(model, [{"x": entries}], progress=False)


FOLDING = {
    "bias through Identity": "i = Identity(bias)  h = MatMul(x, A)  b = Add(h, i)  a = Relu(b)  y = MatMul(a, B)",
    "scalar through Cast": """h = MatMul(x, A)  b = Add(h, bias)  two = Constant<value_int = 2>()
        c = Constant<value = double {0.5}>()  s = Cast<to = 1>(c)  a = Div(b, s)  r = Relu(a)  y = MatMul(r, B)""",
    "scalar through CastLike": """h = MatMul(x, A)  b = Add(h, bias)  c = Constant<value = double {0.5}>()
        s = CastLike(c, b)  a = Mul(b, s)  r = Relu(a)  y = MatMul(r, B)""",
    "its shape is read": """h = MatMul(x, A)  b = Add(h, bias)  a = Relu(b)  s = Shape(b)  z = Cast<to = 1>(s)
        q = ReduceMin<keepdims = 0>(z)  w = MatMul(a, B)  y = Mul(w, q)""",
    "a comparison": """h = MatMul(x, A)  b = Add(h, bias)  c = Constant<value = float {0.5}>()  g = Greater(b, c)
        a = Where(g, b, c)  y = MatMul(a, B)""",
}
NOT_FOLDING = {
    "a gate": "h = MatMul(x, A)  g = Softmax(h)  a = Mul(h, g)  y = MatMul(a, B)",
    "a column": "h = MatMul(x, A)  s = ReduceSum(h)  a = Mul(h, s)  y = MatMul(a, B)",
    "two readers": "h = MatMul(x, A)  a = Relu(h)  u = MatMul(a, B)  t = Tanh(h)  v = MatMul(t, B)  y = Add(u, v)",
}


@pytest.mark.parametrize("name", [*FOLDING, *NOT_FOLDING])
def test_folded_or_not_it_is_exact_at_full_rank(name: str, tmp_path: Path) -> None:
    model, out = save(tmp_path / "m.onnx", {**FOLDING, **NOT_FOLDING}[name]), tmp_path / "o.onnx"
    plan = tdc.plan(model, budget="params=0.9", progress=False)
    for variant in ("input", "output"):
        choices = (
            replace(c, decomposition="pivoted", variant=variant, ranks=(("r", min(c.site.axes.values())),))
            for c in plan.choices
        )
        tdc.compress_onnx(model, out, plan=replace(plan, choices=tuple(choices)), progress=False)
        properties = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
        folded = [site["folded"] for site in json.loads(properties["tdc.report"])["sites"]]
        assert any(folded) == (name in FOLDING)
        np.testing.assert_allclose(run(out), run(model), rtol=1e-4, atol=1e-5 * float(np.abs(run(model)).max()))
