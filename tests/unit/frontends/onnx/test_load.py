"""Files that nobody vouches for: read right, or refused with one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tdc.errors import ModelError
from tdc.frontends.onnx import OnnxProgram, load_model

Build = Callable[..., onnx.ModelProto]
F = np.dtype("float32")


@pytest.fixture
def good(build: Build) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(F)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    return build([node], {"x": (F, ["b", 6])}, {"y": F}, {"w": weight})


def refused(path: Path, data: bytes | onnx.ModelProto) -> str:
    """Write the file, and give back the message of its refusal."""
    path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_good_file_comes_back_as_it_was(good: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(good.SerializeToString())
    for given in (path, str(path)):
        read = ir.to_proto(load_model(given))
        read.graph.ClearField("value_info")  # onnx_ir notes the shapes of initializers there
        assert read == good


def test_missing_directory_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx cannot be read: No such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is not a file but a directory"):
        load_model(tmp_path)
    assert "is empty" in refused(tmp_path / "m.onnx", b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is not a file"):
        load_model(tmp_path / "pipe")


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes(seed: int, tmp_path: Path) -> None:
    data = np.random.default_rng(seed).integers(0, 256, 10 ** (seed % 4 + 1), np.uint8).tobytes()
    assert refused(tmp_path / "m.onnx", data)


@pytest.mark.parametrize("part", range(1, 32))
def test_truncated(part: int, good: onnx.ModelProto, tmp_path: Path) -> None:
    data = good.SerializeToString()
    assert refused(tmp_path / "m.onnx", data[: len(data) * part // 32])


def test_a_flipped_byte_is_read_or_refused(good: onnx.ModelProto, tmp_path: Path) -> None:
    data = bytearray(good.SerializeToString())
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        at, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
        data[at] ^= bit
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            OnnxProgram(load_model(tmp_path / "m.onnx"), None).sites()
            outcomes.add("read")
        except ModelError:
            outcomes.add("refused")
        data[at] ^= bit
    assert outcomes == {"read", "refused"}


def test_other_messages_are_not_models(good: onnx.ModelProto, tmp_path: Path) -> None:
    assert refused(tmp_path / "m.onnx", good.graph.SerializeToString())
    assert refused(tmp_path / "m.onnx", good.graph.initializer[0].SerializeToString())
    assert "holds no graph" in refused(tmp_path / "m.onnx", onnx.ModelProto(ir_version=8).SerializeToString())


Edit = Callable[[onnx.ModelProto], object]


def _versions(model: onnx.ModelProto, opset: int = 20, version: int = 10) -> None:
    model.opset_import[0].version = opset
    model.ir_version = version


def _tensor(edit: Callable[[TensorProto], object]) -> Edit:
    return lambda model: edit(model.graph.initializer[0])


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["p", "q"], ["r"]))
    model.graph.node.append(helper.make_node("Add", ["r", "q"], ["p"]))


NEWEST = onnx.defs.onnx_opset_version()
EDITS: dict[str, tuple[Edit, str]] = {
    "newer opset": (lambda m: _versions(m, opset=99), f"uses opset 99; this onnx package knows 1 to {NEWEST}"),
    "opset 0": (lambda m: _versions(m, opset=0), "uses opset 0"),
    "newer ir": (
        lambda m: _versions(m, version=99),
        f"has IR version 99; this onnx package reads up to {onnx.IR_VERSION}",
    ),
    "no ir": (lambda m: m.ClearField("ir_version"), "states no IR version"),
    "no opset": (lambda m: m.ClearField("opset_import"), "imports no operator set"),
    "two opsets": (
        lambda m: m.opset_import.add(domain="ai.onnx", version=20),
        "imports the operator set 'ai.onnx' twice",
    ),
    "training": (lambda m: m.training_info.add(), "holds training information"),
    "longer": (_tensor(lambda t: setattr(t, "raw_data", t.raw_data + b"\0" * 4)), "'w' has 100 bytes, but its shape"),
    "shorter": (
        _tensor(lambda t: setattr(t, "raw_data", t.raw_data[:-1])),
        "'w' has 95 bytes, but its shape [6, 4] needs 96",
    ),
    "twice": (_tensor(lambda t: t.float_data.append(1.0)), "'w' is stored twice, as float_data and raw_data"),
    "no data": (_tensor(lambda t: t.ClearField("raw_data")), "'w' has 0 entries, but its shape [6, 4] needs 24"),
    "negative": (_tensor(lambda t: t.dims.append(-1)), "has the negative size -1"),
    "huge": (_tensor(lambda t: t.dims.extend([1 << 40, 1 << 40])), "has 96 bytes, but its shape"),
    "no type": (_tensor(lambda t: setattr(t, "data_type", 0)), "has no element type"),
    "odd type": (_tensor(lambda t: setattr(t, "data_type", 999)), "has the unknown element type 999"),
    "segment": (_tensor(lambda t: t.segment.SetInParent()), "is stored in segments"),
    "two names": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "has two initializers named 'w'"),
    "no name": (_tensor(lambda t: setattr(t, "name", "")), "has an initializer without a name"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "has sparse initializers"),
    "dangling": (lambda m: m.graph.node.append(helper.make_node("Relu", ["ghost"], ["v"])), "is not a valid model"),
    "cycle": (_cycle, "is not a valid model"),
    "two outputs": (lambda m: m.graph.node.append(m.graph.node[0]), "is not a valid model"),
    "unsorted": (lambda m: m.graph.node.insert(0, helper.make_node("Relu", ["y"], ["v"])), "is not a valid model"),
    "unknown op": (lambda m: setattr(m.graph.node[0], "op_type", "Frobnicate"), "is not a valid model"),
    "shapes": (lambda m: m.graph.input[0].type.tensor_type.shape.dim.add(dim_value=5), "is not a valid model"),
}


@pytest.mark.parametrize("name", EDITS)
def test_broken_models(name: str, good: onnx.ModelProto, tmp_path: Path) -> None:
    edit, message = EDITS[name]
    edit(good)
    assert message in refused(tmp_path / "m.onnx", good)


def test_graphs_nested_beyond_reason(good: onnx.ModelProto, tmp_path: Path) -> None:
    def field(number: int, payload: bytes) -> bytes:
        size, text = len(payload), b""
        while size >= 128:
            text, size = text + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + text + bytes([size]) + payload

    graph = b""
    for _ in range(200):  # graph.node[0].attribute[0].g, again and again
        graph = field(1, field(5, field(6, graph)))
    assert "is not an ONNX model, or is cut off" in refused(
        tmp_path / "m.onnx", good.SerializeToString() + field(7, graph)
    )


def test_constants_are_checked_too(build: Build, tmp_path: Path) -> None:
    value = TensorProto(data_type=TensorProto.FLOAT, dims=[6, 4], raw_data=b"\0" * 8)
    nodes = [helper.make_node("Constant", [], ["w"], value=value), helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        )
    )
    assert "has 8 bytes, but its shape [6, 4] needs 96" in refused(tmp_path / "m.onnx", proto)


def external(model: onnx.ModelProto, **entries: str) -> onnx.ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def test_external_data_is_read(good: onnx.ModelProto, tmp_path: Path) -> None:
    raw = good.graph.initializer[0].raw_data
    (tmp_path / "w.bin").write_bytes(b"1234" + raw)
    path = tmp_path / "m.onnx"
    path.write_bytes(external(good, location="w.bin", offset="4", length="96").SerializeToString())
    program = OnnxProgram(load_model(path), path)
    (site,), _ = program.sites()
    assert program.weight(site).numpy().T.tobytes() == raw
    x = np.ones((2, 6), F)
    assert np.allclose(program.outputs({"x": x}, {})["y"], x @ np.frombuffer(raw, F).reshape(6, 4), rtol=1e-5)


EXTERNAL = {
    "parent": ({"location": "../w.bin"}, "outside the folder"),
    "nested parent": ({"location": "sub/../../w.bin"}, "outside the folder"),
    "absolute": ({"location": "/etc/hostname"}, "outside the folder"),
    "drive": ({"location": "C:w.bin"}, "outside the folder"),
    "backslash": ({"location": "..\\w.bin"}, "outside the folder"),
    "nothing": ({"location": ""}, "outside the folder"),
    "dot": ({"location": "."}, "outside the folder"),
    "memory": ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "outside the folder"),
    "missing": ({"location": "none.bin"}, "cannot be read: No such file"),
    "link": ({"location": "link.bin"}, "through the link"),
    "linked folder": ({"location": "there/w.bin"}, "through the link"),
    "hard link": ({"location": "hard.bin"}, "2 hard links"),
    "pipe": ({"location": "pipe"}, "not a regular file"),
    "folder": ({"location": "sub"}, "not a regular file"),
    "negative offset": ({"location": "w.bin", "offset": "-4"}, "the external offset '-4'"),
    "text offset": ({"location": "w.bin", "offset": "four"}, "the external offset 'four'"),
    "huge offset": ({"location": "w.bin", "offset": "9" * 30}, "the external offset"),
    "negative length": ({"location": "w.bin", "length": "-1"}, "the external length '-1'"),
    "wrong length": ({"location": "w.bin", "length": "95"}, "has 95 external bytes, but its shape [6, 4] needs 96"),
    "past the end": ({"location": "w.bin", "offset": "8"}, "ends at byte 104 of an external file of 100 bytes"),
    "unknown key": ({"location": "w.bin", "pathname": "x"}, "unknown or repeated keys"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_that_must_not_be_read(name: str, good: onnx.ModelProto, tmp_path: Path) -> None:
    entries, message = EXTERNAL[name]
    folder, outside = tmp_path / "model", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for place in (folder, outside, tmp_path):
        (place / "w.bin").write_bytes(b"\0" * 100)
    (folder / "link.bin").symlink_to(outside / "w.bin")
    (folder / "there").symlink_to(outside)
    os.link(tmp_path / "w.bin", folder / "hard.bin")
    os.mkfifo(folder / "pipe")
    assert message in refused(folder / "m.onnx", external(good, **entries))
