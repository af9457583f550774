"""A decomposition from a package that is not TDC's, through the entry-point group ``tdc.decompositions``: one file,
which states an equation and a start, runs through every door.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

FORMAT = '''
import torch

from tdc.decompositions import AlternatingDecomposition


class TwoLevel(AlternatingDecomposition):
    """``W[(a b), (c d)] = sum_r u[a, c, r] v[r, b, d]``: a sum of Kronecker products."""

    name = "two_level"
    summary = "a test"
    equations = {"": "(o1 o2) (i1 i2) = u[o1 i1 r] v[r o2 i2]"}

    def variants(self, axes):
        return ("",) if "g" not in axes else ()

    def modes(self, axes, variant):
        return {"o1": 4, "o2": -(-axes["o"] // 4), "i1": 4, "i2": -(-axes["i"] // 4)}

    def full_ranks(self, axes, variant):
        modes = self.modes(axes, variant)
        return {"r": min(modes["o1"] * modes["i1"], modes["o2"] * modes["i2"])}

    def rank_lattice(self, axes, multiple, variant):
        modes = self.modes(axes, variant)
        stored = modes["o1"] * modes["i1"] + modes["o2"] * modes["i2"]
        most = min(self.full_ranks(axes, variant)["r"], (axes["o"] * axes["i"] - 1) // stored)
        return [{"r": r} for r in range(1, most + 1)]

    def start(self, weight, layout, metric):
        a = layout.axes
        whole = torch.nn.functional.pad(
            weight, (0, a["i1"] * a["i2"] - a["i"], 0, a["o1"] * a["o2"] - a["o"])
        ).reshape(a["o1"], a["o2"], a["i1"], a["i2"])
        pairs = whole.permute(0, 2, 1, 3).reshape(a["o1"] * a["i1"], -1)
        left, values, right = torch.linalg.svd(pairs, full_matrices=False)
        root = values[: a["r"]].sqrt()
        u = (left[:, : a["r"]] * root).reshape(layout.shapes["u"])
        return {"u": u, "v": (root[:, None] * right[: a["r"]]).reshape(layout.shapes["v"])}
'''

RUN = """
import sys
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import tdc

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 24)).eval()
batches = [torch.randn(64, 37) @ torch.randn(37, 37) / 6 for _ in range(4)]
x = batches[0][:5].reshape(5, 37)
options = {"budget": "params=0.25", "allow": "two_level"}
statistics = tdc.calibrate(model, batches, progress=False)
plan = tdc.plan(model, x, statistics=statistics, progress=False, **options)
assert [choice.decomposition for choice in plan.choices] == ["two_level", "two_level"], plan
small = tdc.compress(model, x, plan=plan, statistics=statistics, progress=False)
with torch.no_grad():
    expected, rebuilt = small(x), tdc.densify(small)(x)
assert float((expected - model(x)).norm() / model(x).norm()) < 1
assert float((expected - rebuilt).abs().max()) < 1e-5
three = small(x.reshape(5, 1, 37))
assert float((three[:, 0] - expected).abs().max()) < 1e-5
small(x).sum().backward()
assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in small.parameters())

folder = Path(sys.argv[1])
sizes = ({0: torch.export.Dim("n")},)
torch.onnx.export(model, (x,), folder / "d.onnx", dynamo=True, dynamic_shapes=sizes, input_names=["x"])
again = tdc.plan(folder / "d.onnx", statistics=statistics, progress=False, **options)
assert again == plan
tdc.compress_onnx(folder / "d.onnx", folder / "s.onnx", plan=plan, statistics=statistics, progress=False)
session = onnxruntime.InferenceSession(folder / "s.onnx", providers=["CPUExecutionProvider"])
answer = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
assert float((answer - expected).abs().max()) < 1e-5, float((answer - expected).abs().max())

from tdc.torch_backend import tdc_backend

fast = torch.compile(
    model, backend=tdc_backend, options={**options, "statistics": statistics, "inner": "eager", "strict": True}
)
with torch.no_grad():
    assert float((fast(x) - expected).abs().max()) < 1e-5
print("all doors")
"""


def test_a_format_from_another_package_runs_through_all_doors(tmp_path: Path) -> None:
    (tmp_path / "two_level.py").write_text(FORMAT)
    info = tmp_path / "two_level-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: two-level\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tdc.decompositions]\ntwo_level = two_level:TwoLevel\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("all doors")
