from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import decompositions, kernels, targets
from tdc.ir import Block, Decline, Equation, Op, OpKind, Window
from tdc.kernels import layers
from tdc.kernels.c import two_products as base
from tdc.kernels.triton import device, joint_products, three_convolutions, two_products
from tdc.planning.path import contraction_paths

ROOT = Path(__file__).parents[3]
SHARED = 227 << 10
"""Bytes of shared memory that a program can have on an H100 or H200; 163 kB on an A100."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def run_cases(**environment: str) -> str:
    command = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    cases = Path(__file__).with_name("triton_cases.py")
    run = subprocess.run(
        [sys.executable, "-P", "-c", command, "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    return run.stdout


@needs_triton
def test_the_kernels_compute_what_they_state_in_the_interpreter() -> None:
    assert re.search(r"^\d{2,} passed", run_cases(TRITON_INTERPRET="1"), re.M)


@pytest.mark.gpu
@needs_triton
def test_the_kernels_compute_what_they_state_on_the_gpu() -> None:
    assert re.search(r"^\d{2,} passed", run_cases(), re.M)


NUMBERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled(code: Any, fixed: dict[str, object], dtype: torch.dtype, capability: int, warps: int) -> tuple[int, str]:
    """Bytes of shared memory, and the PTX, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    floats, indices = ("parts",), ("order", "place", "count")
    types = {}
    for name in (parameter.name for parameter in code.params):
        small = name[:1].islower()
        number = "*fp32" if name in floats else "*i32" if name in indices else NUMBERS[dtype]
        types[name] = "constexpr" if name in fixed else number if small else "i32"
    aligned = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(types.values()) if kind != "constexpr"}
    source = ASTSource(code, types, fixed, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return found.metadata.shared, found.asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, torch.bfloat16), (16, torch.float16), (32, torch.bfloat16), (64, torch.float16), (16, torch.float32)],
)
def test_products_compile_without_a_gpu(rows: int, dtype: torch.dtype) -> None:
    from tdc.kernels.triton import few_rows

    inputs = 1592 if rows < 64 else 4096
    tile = few_rows.tiling(rows, 4096, inputs, dtype.itemsize, 132)
    part, early = tile.part(inputs), tile.part(inputs) == tile.k
    fixed = {
        "PART": part, "ROWS": tile.rows, "BN": tile.n, "BK": tile.k, "SPLIT": tile.split, "ALIGNED": 8,
        "PASSED": True, "STACKED": False, "OVERLAPS": True, "EARLY": early, "PRECISION": "ieee", "STAGES": tile.stages,
    }  # fmt: skip
    forms: tuple[dict[str, object], ...] = (
        {"place": None, "bias": None},
        {"PASSED": False, "STACKED": True},
    )
    for form in forms:
        shared, text = compiled(few_rows.kernel, fixed | form, dtype, 90, tile.warps)
        assert shared < SHARED
        assert text.count("griddepcontrol.wait") == 1
        if early:
            assert text.index("ld.global.v4") < text.index("griddepcontrol.wait"), "the weight is read before it"
        assert (rows > 1 and dtype.itemsize == 2) == bool(re.search(r"mma(\.sync|_async)", text))
    shared, text = compiled(few_rows.kernel, fixed | forms[0] | {"OVERLAPS": False}, dtype, 80, tile.warps)
    assert shared < 163 << 10
    assert "griddepcontrol" not in text
    compiled(few_rows.gathering, {"OVERLAPS": True, "BLOCK": 512}, dtype, 90, 4)


@needs_triton
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("channels", [80, 256])
def test_convolutions_compile_without_a_gpu(channels: int, whole: bool) -> None:
    from tdc.kernels.triton import windows

    tile = windows.Windows(128, 64, 32, 1, 8, 5)
    window = windows.Window2((3, 3), (1, 1), (1, 1))
    fixed = windows.constants((28, 28), (64, channels, channels, 64), window, tile) | {"WHOLE": whole, "OVERLAPS": True}
    shared, text = compiled(windows.kernel, fixed, torch.float16, 90, tile.warps)
    assert shared < SHARED
    assert "wgmma.mma_async" in text


def test_nothing_loads_triton_before_a_kernel_runs(tmp_path: Path) -> None:
    code = (
        "import sys, torch, tdc, tdc.kernels\n"
        "tdc.kernels.kernels()\n"
        "from tdc.kernels.triton import device, joint_products, three_convolutions, two_products\n"
        "joint_products.operator(), three_convolutions.operator(), two_products.KERNELS[0].available()\n"
        "print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["False"], run.stderr


def test_where_nothing_can_run_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device, "available", device.available.__wrapped__)
    assert device.available() == Decline("triton is not installed")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.available.__wrapped__() == Decline("no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert device.available.__wrapped__() == Decline("compute capability 7.5, less than 8.0")


def test_captured_calls_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, stream, gpu = [False], [1], torch.device("cuda", 0)
    made: list[Tensor] = []

    def zeros(place: torch.device, number: int) -> Tensor:
        made.append(torch.zeros(number))
        return made[-1]

    monkeypatch.setattr(device, "_zeros", zeros)
    monkeypatch.setattr(device, "COUNTERS", 8)
    monkeypatch.setattr(device, "_captured", {})
    monkeypatch.setattr(device, "_by_stream", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: SimpleNamespace(cuda_stream=stream[0]))

    def places(number: int) -> set[int]:
        return {entry.data_ptr() for entry in device.counters(gpu, number)}

    assert places(3) < places(5)
    stream[0] = 2
    other = places(5)
    capturing[0] = True
    handed = [places(3), places(3), places(3)]
    assert not other & set.union(*handed)
    assert len(set.union(*handed)) == 9
    assert made[-1].numel() == 3, "the piece had no more, this one is zeroed in the graph"
    capturing[0] = False
    assert places(5) == other
    capturing[0] = True
    again = places(7)
    assert len(again) == 7
    assert not again & set.union(other, *handed)
    assert [t.numel() for t in made] == [8, 8, 8, 3, 8]


def test_a_weight_is_settled_once_it_was_seen_as_it_is() -> None:
    weight = torch.randn(3, 4)
    assert [two_products.settled(weight) for _ in range(3)] == [False, True, True]
    weight.add_(1)
    assert [two_products.settled(weight) for _ in range(2)] == [False, True]
    weight.data = torch.randn(3, 4)
    assert not two_products.settled(weight)
    with torch.inference_mode():
        assert not any(two_products.settled(w) for w in [torch.randn(3, 4)] * 2)
    key = id(weight)
    assert key in two_products._seen
    del weight
    assert key not in two_products._seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_what_the_code_does_not_take_is_refused(dtype: torch.dtype) -> None:
    x, first, second = (torch.ones(shape, dtype=dtype) for shape in ((2, 6), (3, 6), (5, 3)))
    with pytest.raises(ValueError, match="Triton code takes float16, bfloat16 or float32, on an NVIDIA GPU"):
        two_products.run(x, first, second)
    with pytest.raises(ValueError, match="do not fit each other"):
        two_products.run(x, second, first)
    with pytest.raises(ValueError, match="do not fit each other"):
        joint_products.run(x, first, [second, first])


@needs_triton
def test_on_the_processor_it_runs_in_the_interpreter_alone() -> None:
    with pytest.raises(ValueError, match="on an NVIDIA GPU"):
        two_products.run(torch.ones(2, 6), torch.ones(3, 6), torch.ones(5, 3))


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def joint() -> tuple[Any, ...]:
    x, first, *others = random((3, 2, 20), (5, 20), (7, 5), (11, 5), (7,), (11,))
    return joint_products, (x, first, others[:2], others[2:])


def sliding() -> tuple[Any, ...]:
    return three_convolutions, (*random((2, 5, 8, 9), (3, 5), (4, 3, 3, 3), (6, 4), (6,)), [2, 2], [1, 1])


@pytest.mark.parametrize("make", [joint, sliding])
def test_the_operators_obey_the_rules_of_torch(make: Any) -> None:
    module, given = make()
    assert set(torch.library.opcheck(module.operator(), given).values()) == {"SUCCESS"}
    for mine, right in zip(module.operator()(*given), module.reference(*given), strict=True):
        torch.testing.assert_close(mine, right)


def test_gradients_are_exact() -> None:
    x, first, *others = (
        t.detach().double().requires_grad_() for t in random((4, 6), (3, 6), (5, 3), (2, 3), (5,), (2,))
    )

    def several(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(joint_products.operator()(*given[:2], list(given[2:4]), list(given[4:])))

    assert torch.autograd.gradcheck(several, (x, first, *others))
    assert torch.autograd.gradgradcheck(several, (x, first, *others))
    _, (*factors, stride, padding) = sliding()
    doubles = [t.detach().double().requires_grad_() for t in factors]
    assert torch.autograd.gradcheck(lambda *t: three_convolutions.operator()(*t, stride, padding), doubles)


def test_blocks_with_one_first_factor_are_joint() -> None:
    inner, outer = Equation.parse("b i, r i -> b r"), Equation.parse("b r, o r -> b o")

    def block(first: str, second: str, o: int) -> Block:
        ops = Op("matmul", "t0", ("x", first), inner), Op("matmul", "t1", ("t0", second), outer)
        return Block(((first, (7, 20)), (second, (o, 7))), ops, "t1", (("o", o), ("i", 20), ("r", 7)))

    found = joint_products.fits([block("v", "q", 24), block("v", "k", 16)])
    assert [match.factors for match in found] == [("v", "q"), ("v", "k")]
    assert joint_products.fits([block("v", "q", 24), block("w", "k", 16)]) == Decline(
        "joint_products: the first factors are not one"
    )


def sliding_block(**changes: Any) -> Block:
    """A convolution between two pointwise ones; ``changes`` of its window down the columns."""
    layout = decompositions.get("tucker2").layout({"g": 1, "o": 6, "i": 5, "p": 3, "q": 3}, {"s": 4, "r": 3}, "")
    down = replace(Window("p", 3, 2, 1, 1, 1), **changes)
    windows = (down, Window("q", 3, 2, 1, 1, 1))
    block = targets.get("cpu").lower(OpKind.CONV2D, layout, contraction_paths(OpKind.CONV2D, layout, windows))
    assert isinstance(block, Block)
    return block


def test_a_convolution_between_pointwise_ones_has_a_kernel_on_the_gpu() -> None:
    found = three_convolutions.KERNEL.match(sliding_block())
    assert isinstance(found, kernels.Match)
    assert found.factors == ("v", "core", "u")
    _, (x, first, core, last, bias, *window) = sliding()
    factors = {"v": first, "core": core, "u": last}
    right = three_convolutions.reference(x, first, core, last, bias, *window)
    torch.testing.assert_close(found(x, factors, bias), right)
    torch.testing.assert_close(found.reference(x, factors, bias), right)
    for changes in ({"dilation": 2}, {"after": 2}, {"auto": "upper", "before": 0, "after": 0}):
        assert "channels last" in three_convolutions.KERNEL.match(sliding_block(**changes)).reason


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 8, bias=False))
    return tdc.compress(model, torch.randn(3, 24), budget="params=0.6", metric="weight", progress=False).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_layers_on_the_gpu_run_on_kernels(
    small: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.to("cuda", dtype)
    x = torch.randn(3, 24, device="cuda", dtype=dtype)
    with torch.no_grad():
        right = small(x)
        remarks = kernels.accelerate(small, rows=(1, 4))
        assert all("on the GPU" in str(remark) and "in a CUDA graph" in str(remark) for remark in remarks)
        monkeypatch.setattr(layers, "GAIN", 0.0)
        kernels.accelerate(small, rows=(4,))
        torch.testing.assert_close(small(x), right, rtol=1e-2, atol=1e-2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = small(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, small(x), rtol=0, atol=0)
        kernels.accelerate(small, ())
        torch.testing.assert_close(y, small(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_the_operators_run_their_kernels_on_the_gpu() -> None:
    x, first, second = (t.detach().cuda().half() for t in random((3, 64), (32, 64), (48, 32)))
    assert torch.equal(base.operator()(x, first, second), two_products.run(x, first, second))
    joined = joint_products.operator()(x, first, [second], [])
    assert torch.equal(joined[0], two_products.run(x, first, second))
    module, given = sliding()
    halves = [t.detach().cuda().half() if isinstance(t, Tensor) else t for t in given]
    halves[0] = halves[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.operator()(*halves), module.run(*halves))


@pytest.mark.gpu
def test_graphs_replayed_beside_each_other_do_not_share_counters() -> None:
    weights = [torch.randn(512, 4096, device="cuda").half() for _ in range(2)]
    x, second = torch.randn(8, 4096, device="cuda").half(), torch.randn(256, 512, device="cuda").half()
    right = [two_products.run(x, w, second) for w in weights]
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in weights]
    for w in weights:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([two_products.run(x, w, second) for _ in range(20)])
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for many, one in zip(results, right, strict=True):
        assert all(torch.equal(result, one) for result in many)
