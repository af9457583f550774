"""VGG11's convolutions: weighted Tucker-2 against HOOI at equal ranks, and predicted against measured errors.

    python benchmarks/bench_fits.py

Training images 0 to 4095 for the statistics, 20000 to 20255 for the sensitivities, 1,000 images of the development part
to measure on: disjoint. `input` rows: squared error in the metric, as a fraction of the mean square of the layer's
output, and of the weight (Frobenius), at half and a quarter of the channels. `predicted` rows: `error` of the report at
params=0.1 and 0.5, and the change of the layer's output that was measured on its dense inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from common import write_rows
from torch import Tensor, nn
from vgg import cifar, load_vgg11

import tdc
from tdc import decompositions
from tdc.frontends.nn import NnProgram
from tdc.ir import Metric

HOOI, WEIGHTED = "HOOI", "weighted"


def main() -> None:
    model = load_vgg11()
    calibration, probe = cifar("train", 4096)[0], cifar("train", 256, 20000)[0]
    images = cifar("dev", 1000)[0].contiguous()
    statistics = tdc.calibrate(model, list(calibration.split(256)), probe=[probe])
    rows = [row for budget in ("params=0.1", "params=0.5") for row in predictions(model, budget, statistics, images)]
    rows += fits(model, statistics, images)
    write_rows("vgg11_fits", rows)


def fits(model: nn.Module, statistics: tdc.Statistics, images: Tensor) -> list[dict[str, Any]]:
    program, tucker = NnProgram(model, (images[:4],)), decompositions.get("tucker2")
    sites = [site for site in program.sites()[0] if site.kind.is_conv and site.axes["i"] > 3]
    known, rows = statistics.of(sites), []
    for site in sites:
        weight = program.weight(site).double()
        metric = statistics.metric(known[site.order], weight, fitting=False)
        fitting = statistics.metric(known[site.order], weight)
        whole = decompositions.energy(weight.reshape(*site.matrix), metric)
        for part in (2, 4):
            ranks = {"s": site.axes["o"] // part, "r": site.axes["i"] // part}
            layout = tucker.layout(site.axes, ranks, "")
            row: dict[str, Any] = {"what": "input", "site": site.name, "ranks": f"r={ranks['r']} s={ranks['s']}"}
            for name, norm in ((WEIGHTED, fitting), (HOOI, Metric("weight"))):
                rest = (weight - decompositions.rebuild(tucker.fit(weight, layout, norm), layout)).reshape(*site.matrix)
                assert metric.second_moment is not None
                row[f"{name} error"] = float(((rest @ metric.second_moment) * rest).sum()) / whole
                row[f"{name} weight error"] = float(rest.square().sum() / weight.square().sum())
            row["below HOOI"] = 1 - row[f"{WEIGHTED} error"] / row[f"{HOOI} error"]
            rows.append({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})
            print(rows[-1], flush=True)
    return rows


def predictions(model: nn.Module, budget: str, statistics: tdc.Statistics, images: Tensor) -> list[dict[str, Any]]:
    small = tdc.compress(model, (images[:4],), budget=budget, statistics=statistics)
    rows = []
    for site in tdc.report(small).sites:
        if site.decomposition == "dense":
            continue
        path = site.name.removesuffix(".weight")
        measured = change(model, path, small.get_submodule(path), images)
        row = {"what": "predicted", "site": site.name, "budget": budget, "predicted": f"{site.error:.4g}"}
        rows.append({**row, "measured": f"{measured:.4g}", "measured / predicted": f"{measured / site.error:.3f}"})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def change(model: nn.Module, path: str, new: nn.Module, images: Tensor) -> float:
    """Mean squared change of a layer's output on its dense inputs, over the mean square of the output without bias."""
    layer, seen = model.get_submodule(path), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for part in images.split(250):
        model(part)
    handle.remove()
    parent, _, place = path.rpartition(".")
    behind = model.get_submodule(f"{parent}.{int(place) + 1}") if parent else nn.Identity()
    zero = behind(layer(torch.zeros_like(seen[0][:1])))
    centre = zero[:, :, zero.shape[2] // 2, zero.shape[3] // 2][..., None, None] if zero.ndim == 4 else zero
    lost = whole = 0.0
    for x in seen:
        dense = behind(layer(x))
        lost += float((new(x) - dense).double().square().sum())
        whole += float((dense - centre).double().square().sum())
    return lost / whole


if __name__ == "__main__":
    main()
