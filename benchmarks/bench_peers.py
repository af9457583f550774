"""Layers of TDC beside those of other packages: same weight, same ranks, one thread, batches of 1 and 16.

    python benchmarks/bench_peers.py [--laps 40]

Peers, each passed over with a line where it is not installed (an environment of its own serves best: torch,
tensorly-torch, comprexx and fasterai with --no-deps, what these import, and TDC):

- tensorly-torch 0.5.0: FactorizedLinear (CP of a matrix, which is low rank) and FactorizedConv (Tucker), each
  ``factorized`` and ``reconstructed``, with the factors that TDC fits;
- comprexx 0.3.0: LowRankDecomposition, linear layers only, its own fit at the same rank;
- fasterai 0.4.1: FC_Decomposer and Conv_Decomposer(tucker), its own fit at the same ranks;
- ``stock``: the factors that TDC fits as plain torch layers in a row.

``TDC``: the factored layer of ``tdc.compress`` after ``tdc.kernels.accelerate``, which takes the kernel where it
measures it to be faster; ``kernel`` says whether. Linear layers keep half the parameters, 3 x 3 convolutions of
ResNet-18 have a quarter of the channels as ranks. The weight is random with singular values that fall as 1/k. Every
contestant goes through a pool of its own of layers, all in turn in one run, four layers at a time; so weights are cold
and code is warm, as in a model of several such layers. ``error``: of the output, relative to the dense layer's.
``bytes``: parameters, of dense. Times in microseconds, least and median, and how many times as fast as dense. Rows go
to results/peers.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_convolutions import windows
from common import write_rows
from torch import Tensor, nn

from tdc import decompositions, kernels, targets
from tdc.frontends.nn.factored import factored
from tdc.ir import Block, Metric, OpKind
from tdc.planning.path import contraction_paths

NAME = "peers"
POOL = 48 << 20
TOGETHER = 4
LINEARS = ((1024, 1024), (3072, 768), (768, 3072))
"""(outputs, inputs)."""
CONVOLUTIONS = (
    (64, 64, 56, 1),
    (128, 64, 56, 2),
    (128, 128, 28, 1),
    (256, 128, 28, 2),
    (256, 256, 14, 1),
    (512, 256, 14, 2),
    (512, 512, 7, 1),
)
"""(outputs, inputs, size, stride)."""


@dataclass(frozen=True)
class Case:
    """A dense layer, an input without its batch, and what TDC fits: ranks, factors and the factored layer."""

    label: str
    dense: nn.Module
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    factors: dict[str, Tensor]
    layer: nn.Module


def falling(*shape: int) -> Tensor:
    """A weight whose singular values, as a matrix (outputs, all else), fall as 1/k."""
    u, s, v = torch.linalg.svd(torch.randn(shape[0], torch.Size(shape[1:]).numel()), full_matrices=False)
    return ((u / torch.arange(1, len(s) + 1)) @ v).reshape(shape)


def case(dense: nn.Module, name: str, kind: OpKind, axes: dict[str, int], ranks: dict[str, int], stride: int) -> Case:
    weight = dense.get_parameter("weight").data
    layout = decompositions.get(name).layout(axes, ranks, "")
    canonical = weight[None] if kind.is_conv else weight
    factors = decompositions.get(name).fit(canonical, layout, Metric("weight"))
    slides = windows(stride) if kind.is_conv else ()
    block = targets.get("cpu").lower(kind, layout, contraction_paths(kind, layout, slides))
    assert isinstance(block, Block), block
    factors = {key: factor.float().contiguous() for key, factor in factors.items()}
    layer = factored(dense, block, dict(factors), name, dense.get_parameter("bias"))
    label = " x ".join(map(str, weight.shape)) + (f", stride {stride}" if stride > 1 else "")
    return Case(label, dense, (), tuple(ranks.values()), factors, layer)


def linear_case(outputs: int, inputs: int) -> Case:
    dense = nn.Linear(inputs, outputs)
    dense.weight.data = falling(outputs, inputs)
    rank = outputs * inputs // 2 // (outputs + inputs) // 8 * 8
    made = case(dense, "svd", OpKind.LINEAR, {"o": outputs, "i": inputs}, {"r": rank}, 1)
    return Case(made.label, dense, (inputs,), (rank,), made.factors, made.layer)


def conv_case(outputs: int, inputs: int, size: int, stride: int) -> Case:
    dense = nn.Conv2d(inputs, outputs, 3, stride, 1)
    dense.weight.data = falling(outputs, inputs, 3, 3)
    ranks = {"s": outputs // 4, "r": inputs // 4}
    axes = {"g": 1, "o": outputs, "i": inputs, "p": 3, "q": 3}
    made = case(dense, "tucker2", OpKind.CONV2D, axes, ranks, stride)
    return Case(made.label, dense, (inputs, size, size), tuple(ranks.values()), made.factors, made.layer)


def stock(c: Case) -> nn.Module:
    bias = c.dense.get_parameter("bias")
    if isinstance(c.dense, nn.Linear):
        first, last = (factor for factor in (c.factors["v"], c.factors["u"]))
        row: list[nn.Module] = [nn.Linear(*first.shape[::-1], bias=False), nn.Linear(*last.shape[::-1])]
        weights = [first, last]
    else:
        assert isinstance(c.dense, nn.Conv2d)
        u, core, v = c.factors["u"], c.factors["core"], c.factors["v"]
        weights = [v[:, :, None, None], core, u[:, :, None, None]]
        row = [
            nn.Conv2d(v.shape[1], v.shape[0], 1, bias=False),
            nn.Conv2d(core.shape[1], core.shape[0], 3, c.dense.stride, 1, bias=False),
            nn.Conv2d(u.shape[1], u.shape[0], 1),
        ]
    for module, weight in zip(row, weights, strict=True):
        module.weight = nn.Parameter(weight.contiguous())
    row[-1].bias = bias
    return nn.Sequential(*row)


def tensorly(c: Case, implementation: str) -> nn.Module:
    import tltorch

    if isinstance(c.dense, nn.Linear):
        sizes = (c.dense.in_features,), (c.dense.out_features,)
        made = tltorch.FactorizedLinear(*sizes, factorization="CP", rank=c.ranks[0], implementation=implementation)
        made.weight.weights.data = torch.ones(c.ranks[0])
        factors = [c.factors["u"], c.factors["v"].T.contiguous()]
    else:
        made = tltorch.FactorizedConv.from_conv(
            c.dense,
            rank=(*c.ranks, 3, 3),
            implementation=implementation,
            factorization="Tucker",
            decompose_weights=False,
        )
        made.weight.core.data = c.factors["core"].clone()
        factors = [c.factors["u"], c.factors["v"].T.contiguous(), torch.eye(3), torch.eye(3)]
    for own, factor in zip(made.weight.factors, factors, strict=True):
        own.data = factor.clone()
    made.bias.data = c.dense.get_parameter("bias").data.reshape(made.bias.shape)
    return made


def comprexx(c: Case) -> nn.Module | None:
    from comprexx.stages.base import StageContext
    from comprexx.stages.decomposition import LowRankDecomposition

    if not isinstance(c.dense, nn.Linear):
        return None
    whole = min(c.dense.weight.shape)
    stage = LowRankDecomposition(rank_ratio=(c.ranks[0] + 0.5) / whole)
    made: nn.Module = stage.apply(nn.Sequential(c.dense), StageContext(input_shape=(1, *c.shape)))[0]
    return made


def fasterai(c: Case) -> nn.Module:
    if isinstance(c.dense, nn.Linear):
        from fasterai.misc.fc_decomposer import FC_Decomposer

        share = (c.ranks[0] + 0.5) / min(c.dense.weight.shape)
        return FC_Decomposer().decompose(nn.Sequential(c.dense), percent_removed=1 - share)
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    return Conv_Decomposer().decompose(nn.Sequential(c.dense), percent_removed=0.75)


PEERS: dict[str, Callable[[Case], nn.Module | None]] = {
    "dense": lambda c: c.dense,
    "stock": stock,
    "tensorly-torch, factorized": lambda c: tensorly(c, "factorized"),
    "tensorly-torch, reconstructed": lambda c: tensorly(c, "reconstructed"),
    "comprexx": comprexx,
    "fasterai": fasterai,
    "TDC": lambda c: c.layer,
}


class Row(nn.Module):
    """Copies of a layer, each given the same input."""

    def __init__(self, layer: nn.Module, copies: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(copies)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            result: Tensor = layer(x)
        return result


def contestants(c: Case, missing: set[str]) -> dict[str, nn.Module]:
    found = {}
    for name, make in PEERS.items():
        try:
            made = make(c)
        except ImportError as error:
            if name not in missing:
                print(f"skipped: {name}: {error}", flush=True)
            missing.add(name)
            continue
        if made is not None:
            found[name] = made.eval()
    return found


def measured(c: Case, layers: dict[str, nn.Module], batch: int, laps: int) -> list[dict[str, object]]:
    x = torch.randn(batch, *c.shape)
    sizes = {name: sum(p.numel() * 4 for p in layer.parameters()) for name, layer in layers.items()}
    pools = {name: Row(layer, min(POOL // sizes[name] + 2, 48)) for name, layer in layers.items()}
    said = kernels.accelerate(pools["TDC"], example=x)[0].reason
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        right = c.dense(x)
        errors = {name: ((p.layers[0](x) - right).norm() / right.norm()).item() for name, p in pools.items()}
        for lap in range(laps + 2):
            for name, pool in pools.items():
                some = [pool.layers[(lap * TOGETHER + k) % len(pool.layers)] for k in range(TOGETHER)]
                start = time.perf_counter()
                for layer in some:
                    layer(x)
                times[name].append((time.perf_counter() - start) * 1e6 / TOGETHER)
    best = {name: min(taken[2:]) for name, taken in times.items()}
    middle = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    return [
        {
            "layer": c.label,
            "input": " x ".join(map(str, x.shape)),
            "ranks": " ".join(map(str, c.ranks)),
            "by": name,
            "bytes": f"{sizes[name] / sizes['dense']:.3f}",
            "error": f"{errors[name]:.4f}",
            "us": f"{best[name]:.0f}",
            "median us": f"{middle[name]:.0f}",
            "to dense": f"{best['dense'] / best[name]:.2f}",
            "to dense, medians": f"{middle['dense'] / middle[name]:.2f}",
            "kernel": said if name == "TDC" else "",
        }
        for name in layers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=40)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, missing = [], set[str]()
    cases = [linear_case(*sizes) for sizes in LINEARS] + [conv_case(*sizes) for sizes in CONVOLUTIONS]
    for c in cases:
        layers = contestants(c, missing)
        for batch in (1, 16):
            laps = chosen.laps if isinstance(c.dense, nn.Linear) or batch == 1 else max(chosen.laps // 6, 5)
            for row in measured(c, layers, batch, laps):
                rows.append(row)
                print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
    write_rows(NAME, rows)


if __name__ == "__main__":
    main()
