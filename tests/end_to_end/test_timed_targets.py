"""With a table of this machine's times the three doors still make one plan."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tdc
from tdc import _parts, targets
from tdc.ir import Plan
from tdc.ir.machine import Table, Timing, Work
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.c, self.head = nn.Conv2d(32, 48, 1), nn.Linear(48, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """Products and convolutions in a time of their own, gathers that take long."""
    lines = (1.0, 32.0, 1024.0)
    times = {Work("gemm", s): 1e-6 + 1e-10 * s[0] * s[1] * s[2] for s in itertools.product(lines, repeat=3)}
    for kind, cost in (("1x1", 1e-10), ("3x3", 6e-10), ("3x1", 9e-10), ("1x3", 3e-10)):
        for s in itertools.product((1.0, 16.0), lines, lines, lines):
            times[Work(f"conv {kind}", s)] = 1e-6 + cost * s[0] * s[1] * s[2] * s[3]
    times |= {Work("take planes", s): 1e-2 for s in itertools.product((1.0, 16.0), lines, lines)}
    times |= {Work("take", s): 1e-2 for s in itertools.product(lines, lines)}
    made = Table({"of": "a test"}, {work: Timing(t, t) for work, t in times.items()}, "2026-11-26")
    monkeypatch.setattr("tdc.targets.cpu.found", lambda: made)
    return made


def test_one_plan_for_three_doors(table: Table, tmp_path: Path) -> None:
    assert targets.get("auto").table is table
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(6, 8, 12, 12) for _ in range(3)]
    statistics = tdc.calibrate(model, batches, progress=False)
    allow = ["output_svd", "input_svd", "spatial_svd", "tucker2", "svd", "pivoted", "tucker"]
    options = {"budget": "params=0.6", "statistics": statistics, "allow": allow, "progress": False}
    plan = tdc.plan(model, batches[0], **options)
    assert any(f"by the times of this machine, 2026-11-26, table {table.key}" in r.reason for r in plan.remarks)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(
            model, (batches[0],), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
        )
    (tmp_path / "net.onnx").write_bytes(file.getvalue())
    of_file = tdc.plan(tmp_path / "net.onnx", **options)
    assert not all(choice.site.lengths for choice in of_file.choices), "this door does not know them"
    assert of_file == plan

    fast = torch.compile(model, backend=tdc_backend, options={**options, "inner": "eager", "strict": True})
    small = tdc.compress(model, batches[0], plan=plan, statistics=statistics, progress=False)
    with torch.no_grad():
        assert float((fast(batches[1]) - small(batches[1])).abs().max()) < 1e-4
    assert plan_of(fast) == plan


def plan_of(compiled: nn.Module) -> Plan:
    ids = {id(parameter) for parameter in compiled.parameters()}
    *_, part = (part for part in _parts.parts() if any(id(ref()) in ids for ref in part.weights))
    assert part.outcome is not None
    return part.outcome.plan
