"""Every decomposition on every kind of layer in every door; the table of it in the README is what this test finds.

``pytest --update-golden tests/end_to_end/test_formats.py`` writes the table anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc import decompositions
from tdc.ir import Metric, Plan
from tdc.testing import random_factors
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- formats: written by tests/end_to_end/test_formats.py -->", "<!-- end of formats -->"
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (5, 64)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, padding=1), (1, 8, 4, 4, 4)),
}
DOORS = ("nn", "onnx", "fx")


@cache
def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind][0]()).eval()


@cache
def exported(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.onnx"
    torch.onnx.export(model_of(kind), (input_of(kind),), path, dynamo=True, input_names=["x"], external_data=False)
    return path


@cache
def input_of(kind: str) -> Tensor:
    return torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(1))


@cache
def dense_plan(kind: str) -> Plan:
    return tdc.plan(model_of(kind), input_of(kind), budget="params=1.0", allow="svd", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


def axes_of(kind: str) -> Mapping[str, int]:
    return dense_plan(kind).choices[0].site.axes


CASES = [(name, kind) for name in decompositions.names() for kind in KINDS]


def cases() -> list[tuple[str, str, str]]:
    return [(n, kind, variant) for n, kind in CASES for variant in decompositions.get(n).variants(axes_of(kind))]


def lattice_of(name: str, kind: str, variant: str) -> list[dict[str, int]]:
    """Three points at most, in rising order of stored numbers."""
    d, axes = decompositions.get(name), axes_of(kind)
    points = sorted(d.rank_lattice(axes, 1, variant), key=lambda ranks: d.layout(axes, ranks, variant).params)
    chosen = sorted({0, len(points) // 2, len(points) - 1}) if points else []
    return [dict(points[k]) for k in chosen]


@cache
def planned(name: str, kind: str, variant: str) -> Plan | None:
    """A plan file that puts the format in the middle of its lattice; None where it has no lattice."""
    points = lattice_of(name, kind, variant)
    if not points:
        return None
    (choice,) = dense_plan(kind).choices
    ranks = tuple(points[len(points) // 2].items())
    for execution in ("factored", "stored"):
        new = replace(choice, decomposition=name, variant=variant, ranks=ranks, execution=execution)
        plan = replace(dense_plan(kind), choices=(new,))
        try:
            tdc.compress(model_of(kind), input_of(kind), plan=plan, progress=False)
        except tdc.PlanError as error:
            if execution == "stored" or ("by itself" not in str(error) and "slide over" not in str(error)):
                raise
            continue
        return Plan.from_json(plan.to_json())
    return None


def fitted(name: str, kind: str, variant: str, ranks: Mapping[str, int], weight: Tensor) -> Tensor:
    d = decompositions.get(name)
    layout = d.layout(axes_of(kind), ranks, variant)
    return decompositions.rebuild(d.fit(weight, layout, Metric("weight")), layout)


def lost(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).square().sum() / weight.square().sum())


@pytest.mark.parametrize(("name", "kind", "variant"), cases())
def test_a_format(name: str, kind: str, variant: str, folder: Path) -> None:
    d, axes, model, x = decompositions.get(name), axes_of(kind), model_of(kind), input_of(kind)
    weight = (
        model[0].weight.detach().double().reshape(48, 64) if kind == "linear" else model[0].weight.detach().double()
    )
    points = lattice_of(name, kind, variant)
    if d.exact_at_full_rank:
        assert lost(weight, fitted(name, kind, variant, d.full_ranks(axes, variant), weight)) < 1e-20
    elif points:
        layout = d.layout(axes, points[0], variant)
        built = decompositions.rebuild(random_factors(layout, seed=2), layout)
        assert lost(built, fitted(name, kind, variant, points[0], built)) < 1e-3
    errors = [lost(weight, fitted(name, kind, variant, ranks, weight)) for ranks in points]
    assert all(after <= before + 0.01 for before, after in pairwise(errors))
    plan = planned(name, kind, variant)
    if plan is None:
        return
    small = tdc.compress(model, x, plan=plan, progress=False)
    small(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in small.parameters())
    with torch.no_grad():
        expected = small(x)
        own = copy.deepcopy(model)  # what the backend made lives as long as the weights do
        fast = torch.compile(own, backend=tdc_backend, options={"plan": plan, "inner": "eager", "strict": True})
        assert torch.allclose(fast(x), expected, atol=1e-5)
        one_graph = torch.compile(small, backend="eager", fullgraph=True)
        assert torch.allclose(one_graph(x), expected, atol=1e-5)
    path = folder / "small.onnx"
    tdc.compress_onnx(exported(kind, folder), path, plan=plan, progress=False)
    answer = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    assert np.abs(answer - expected.numpy()).max() < 1e-5


def table() -> str:
    rows = []
    for name in decompositions.names():
        d = decompositions.get(name)
        cells = []
        for kind in KINDS:
            plans = [planned(name, kind, variant) for variant in d.variants(axes_of(kind))]
            runs = [plan.choices[0].execution for plan in plans if plan is not None]
            between = d.between_layers and kind in d.layers
            cells.append("between" if between else "factors" if "factored" in runs else "weight" if runs else "")
        start = "exact at full rank" if d.exact_at_full_rank else "finds its own"
        rows.append(
            f"| `{name}` | {' | '.join(cells)} | {start} | {'yes' if d.by_default else 'by name'} | {d.summary} |"
        )
    head = f"| decomposition | {' | '.join(KINDS)} | check | tried | good for |"
    return "\n".join([head, "|" + " --- |" * (len(KINDS) + 4), *rows])


def test_the_table_in_the_readme(request: pytest.FixtureRequest) -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = f"\n{table()}\n"
    if request.config.getoption("--update-golden"):
        README.write_text(f"{before}{BEGIN}{new}{END}{after}", encoding="utf-8")
        return
    assert old == new, "pytest --update-golden tests/end_to_end/test_formats.py writes the table anew"
