"""Saving: a complete, checked file of the same bytes every time, or nothing at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from tdc.errors import DestinationError, VerificationError
from tdc.frontends.onnx import OnnxProgram, load_model, save, save_model

Opened = Callable[[onnx.ModelProto], OnnxProgram]
F = np.dtype("float32")


@pytest.fixture
def model(build: Callable[..., onnx.ModelProto], opened: Opened) -> ir.Model:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((32, 16)).astype(F), "v": rng.standard_normal((16, 40)).astype(F)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    proto = build(nodes, {"x": (F, ["b", 32])}, {"y": F}, {**tensors, "tiny": np.ones(2, F)})
    return opened(proto).model


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((1, 32), F)})
    assert isinstance(y, np.ndarray)
    return y


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_what_is_saved_is_the_model_with_the_metadata(model: ir.Model, tmp_path: Path) -> None:
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    save_model(model, out, metadata={"tdc.plan": "{}", "tdc.report": "text"})
    assert names(out.parent) == {"small.onnx"}
    loaded = load_model(out)
    assert dict(loaded.metadata_props) == {"tdc.plan": "{}", "tdc.report": "text"}
    assert model.metadata_props == {}
    loaded.metadata_props.clear()
    assert ir.to_proto(loaded) == ir.to_proto(model)


def test_same_model_same_bytes(model: ir.Model, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        save_model(model, tmp_path / name, metadata={"k": "v", "a": "b"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_an_older_file_is_replaced(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"older")
    save_model(model, str(tmp_path / "out.onnx"))
    assert run(tmp_path / "out.onnx").shape == (1, 40)


def test_a_link_at_the_destination_is_replaced_not_followed(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "out.onnx").symlink_to(tmp_path / "target")
    save_model(model, tmp_path / "out.onnx")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "out.onnx").is_symlink()


def test_the_file_has_the_usual_permissions(model: ir.Model, tmp_path: Path) -> None:
    save_model(model, tmp_path / "out.onnx")
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_destinations_that_are_refused(model: ir.Model, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    link = tmp_path / "again.onnx"
    link.symlink_to(source)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    for path, message in [
        (tmp_path / "no" / "out.onnx", "there is no folder"),
        (tmp_path / "file" / "out.onnx", "there is no folder"),
        (tmp_path / "folder", "it is a directory"),
        (source, "from which the model is read"),
        (link, "from which the model is read"),
    ]:
        with pytest.raises(DestinationError, match=message):
            save_model(model, path, source=source)
    assert names(tmp_path) == before


@pytest.mark.parametrize("limit", [10, 10**9], ids=["external", "inline"])
@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_failed_write_leaves_nothing(
    call: str, limit: int, model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "small.onnx").write_bytes(b"older")
    monkeypatch.setattr(save, "INLINE_LIMIT", limit)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DestinationError, match=r"small\.onnx cannot be written: No space left on device"):
            save_model(model, out / "small.onnx")
    assert names(out) == {"small.onnx"}
    assert (out / "small.onnx").read_bytes() == b"older"


def test_only_the_last_move_failing_removes_the_data_file(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(save, "INLINE_LIMIT", 10)
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        if Path(new).suffix == ".onnx":
            raise OSError(5, "Input/output error")
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(DestinationError):
            save_model(model, out / "small.onnx")
    assert names(out) == set()


def test_a_refused_model_leaves_nothing(model: ir.Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (node, *_) = model.graph
    node.op_type = "Frobnicate"
    with pytest.raises(VerificationError, match="the new model is not valid"):
        save_model(model, out / "small.onnx")
    assert names(out) == set()


def test_a_model_that_only_the_runtime_refuses_leaves_nothing(model: ir.Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for node in model.graph:
        node.name = "twice"
    with pytest.raises(VerificationError, match="onnxruntime refuses the new model"):
        save_model(model, out / "small.onnx")
    assert names(out) == set()


def test_large_models_get_a_data_file_named_after_its_content(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, out / "inline.onnx")
    monkeypatch.setattr(save, "INLINE_LIMIT", 10)
    save_model(model, out / "small.onnx")
    (data,) = names(out) - {"small.onnx", "inline.onnx"}
    assert data.startswith("small-")
    assert data.endswith(".data")
    assert np.array_equal(run(out / "small.onnx"), run(out / "inline.onnx"))
    first = {name: (out / name).read_bytes() for name in names(out)}
    save_model(model, out / "small.onnx")
    assert {name: (out / name).read_bytes() for name in names(out)} == first
    again = load_model(out / "small.onnx")
    assert isinstance(again.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert not isinstance(again.graph.initializers["tiny"].const_value, ir.ExternalTensor)
    (site, _), _ = OnnxProgram(again, None).sites()
    assert np.array_equal(OnnxProgram(again, None).weight(site), OnnxProgram(model, None).weight(site))


def test_a_source_with_a_data_file_gives_one_with_a_data_file(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(save, "INLINE_LIMIT", 10)
        save_model(model, tmp_path / "big.onnx")
    loaded = load_model(tmp_path / "big.onnx")
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out" / "copy.onnx", source=tmp_path / "big.onnx")
    assert {Path(name).suffix for name in names(tmp_path / "out")} == {".onnx", ".data"}
    assert np.array_equal(run(tmp_path / "out" / "copy.onnx"), run(tmp_path / "big.onnx"))
    (data,) = [entry for entry in tmp_path.iterdir() if entry.suffix == ".data"]
    with pytest.raises(DestinationError, match="from which the model is read"):
        save_model(loaded, data)


def test_operators_of_others_are_left_to_them(
    build: Callable[..., onnx.ModelProto], opened: Opened, tmp_path: Path
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["h"])
    proto = build(
        [node, helper.make_node("Relu", ["h"], ["y"])], {"x": (F, ["b", 6])}, {"y": F}, {"w": np.ones((6, 4), F)}
    )
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.add(domain="nobody", version=1)
    save_model(opened(proto).model, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").graph.node[1] == proto.graph.node[1]
