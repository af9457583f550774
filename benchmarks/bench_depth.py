"""How long planning and fitting take: real models, and encoders of growing depth; and from plan and cache.

    python benchmarks/bench_depth.py [minilm] [vgg11] [depth] [--threads 2]

After calibration, unhealed, params=0.5, with the defaults: the metric `fisher`, and fits anchored on the calibration
data: 2,048 sentences or images. `depth`: encoders of MiniLM's width with random weights, 6 to 48 layers of six
linears, and 1,024 rows. `again`: the backend of
torch.compile at work with plan, statistics and a cache of fits, from the call to the captured and rewritten graph
(inner "eager": what Inductor takes on top is its own). Rows go to results/depth.csv, in place of those of the same
model and threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from bench_accuracy import MiniLM, Vgg11
from common import read_rows, write_rows
from torch import Tensor, nn

import tdc
from tdc import _fits

NAME, KEYS = "depth", ("model", "threads")
BUDGET = "params=0.5"


class Encoder(nn.Module):
    """Attention and perceptron, ``depth`` times, of MiniLM's width."""

    def __init__(self, depth: int, width: int = 384, hidden: int = 1536) -> None:
        super().__init__()
        names = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        names |= {"up": (width, hidden), "down": (hidden, width)}
        layers = ({name: nn.Linear(*sizes) for name, sizes in names.items()} for _ in range(depth))
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = self.norm(x)
            q, k, v = (layer[name](y).unflatten(-1, (12, 32)).transpose(1, 2) for name in "qkv")
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            x = x + layer["o"](mixed)
            x = x + layer["down"](nn.functional.gelu(layer["up"](self.norm(x))))
        return x


def measured(name: str, model: nn.Module, batches: list[Any], probe: Any, **options: Any) -> dict[str, object]:
    start = time.perf_counter()
    statistics = tdc.calibrate(model, batches, probe=probe, progress=False, **options)
    calibrated = time.perf_counter()
    plan = tdc.plan(model, batches[0], budget=BUDGET, statistics=statistics, progress=False)
    planned = time.perf_counter()
    small = tdc.compress(model, batches[0], plan=plan, statistics=statistics, calibration=batches, progress=False)
    fitted = time.perf_counter()
    row: dict[str, object] = {"model": name, "sites": len(plan.choices), "replaced": tdc.report(small).replaced}
    row |= {"calibrate s": calibrated - start, "plan s": planned - calibrated, "fit s": fitted - planned}
    row["plan and fit s"] = fitted - calibrated
    with tempfile.TemporaryDirectory() as folder:
        common = {"plan": plan, "statistics": statistics, "inner": "eager", "strict": True, "cache": folder}
        for key in ("first compile s", "again s"):
            torch._dynamo.reset()
            _fits._fitted.clear()  # as in another process
            start = time.perf_counter()
            compiled = torch.compile(model, backend="tdc", options=dict(common))
            with torch.no_grad():
                compiled(**batches[0]) if isinstance(batches[0], dict) else compiled(batches[0])
            row[key] = time.perf_counter() - start
    return {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in row.items()}


def rows_of(what: str) -> Any:
    if what == "depth":
        for depth in (6, 12, 24, 48):
            torch.manual_seed(0)
            batches = [torch.randn(4, 64, 384) for _ in range(4)]
            yield measured(f"encoder of {depth} layers", Encoder(depth).eval(), batches, batches[:1])
    elif what == "minilm":
        case: Any = MiniLM()
        yield measured("minilm", case.model, case.calibration[:128], case.probe[:1], exclude="pooler.dense")
    else:
        case = Vgg11()
        yield measured("vgg11", case.model, case.calibration[:8], case.probe[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["minilm", "vgg11", "depth"])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for what in given.models:
        for row in rows_of(what):
            row["threads"] = given.threads
            print(row, flush=True)
            kept = [old for old in read_rows(NAME) if any(old.get(key) != str(row[key]) for key in KEYS)]
            write_rows(NAME, [*kept, row])


if __name__ == "__main__":
    main()
