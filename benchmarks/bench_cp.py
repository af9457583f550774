"""CP of VGG11's convolutions: fitted in the metric, in its output mode alone, and by Frobenius norm, at equal ranks.

    python benchmarks/bench_cp.py [--again]

Training images 0 to 2047 for the statistics. `error`: squared error in the metric (the unshrunk moment of the patches)
as a fraction of the mean square of the layer's output, at a fifth and a tenth of the layer's parameters. `all modes` is
what TDC fits; `outputs` starts from the Frobenius fit and solves for the output factor in the metric, which is what a
published reproduction does; `sensitivity` and `cancellation`: of the corrected factors. Rows that are there already
are kept; --again measures all of them anew.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import read_rows, write_rows
from torch import Tensor
from vgg import cifar, load_vgg11

import tdc
from tdc import decompositions
from tdc.decompositions import Factors, cancellation, refine
from tdc.decompositions._sensitivity import sensitivity
from tdc.frontends.nn import NnProgram
from tdc.ir import Layout, Metric, Site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    old = [] if parser.parse_args().again else [row for row in read_rows("cp") if row["keep"]]
    done = {(row["site"], row["keep"]) for row in old}
    torch.manual_seed(0)
    model = load_vgg11()
    calibration = cifar("train", 2048)[0]
    statistics = tdc.calibrate(model, list(calibration.split(256)), progress=False)
    program, cp = NnProgram(model, (calibration[:4],)), decompositions.get("cp")
    sites = [site for site in program.sites()[0] if site.kind.is_conv and site.axes["i"] > 3]
    known, rows = statistics.of(sites), [dict[str, Any](row) for row in old]
    for site in sites:
        weight = program.weight(site).double()
        metric, fitting = (statistics.metric(known[site.order], weight, fitting=f) for f in (False, True))
        for keep in (0.2, 0.1):
            if (site.name, str(keep)) in done:
                continue
            per_rank = site.axes["o"] + site.axes["i"] + 9
            rank = round(keep * weight.numel() / per_rank)
            layout = cp.layout(site.axes, {"r": rank}, "")
            rows.append({"site": site.name, "keep": keep, "rank": rank, **fits(site, weight, layout, metric, fitting)})
            print(rows[-1], flush=True)
            write_rows("cp", [*rows, mean_below(rows)])  # a run that is stopped keeps what it found


def mean_below(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By what fraction the errors lie below those of the Frobenius fits, on average."""
    shares = {how: [1 - float(r[how]) / float(r["frobenius"]) for r in rows] for how in ("outputs", "all modes")}
    return {"site": "mean below frobenius", **{how: f"{sum(s) / len(s):.3f}" for how, s in shares.items()}}


def fits(site: Site, weight: Tensor, layout: Layout, metric: Metric, fitting: Metric) -> dict[str, Any]:
    cp = decompositions.get("cp")
    start = time.perf_counter()
    frobenius = cp.fit(weight, layout, Metric("weight"))
    middle = time.perf_counter()
    whole = cp.fit(weight, layout, fitting)
    end = time.perf_counter()
    outputs = refine(frobenius, layout, weight, fitting, sweeps=1, names=["a"])[0]
    found = {"frobenius": frobenius, "outputs": outputs, "all modes": whole}
    row: dict[str, Any] = {name: f"{error(site, weight, layout, f, metric):.4g}" for name, f in found.items()}
    row["sensitivity"] = f"{sensitivity(whole, layout):.4g}"
    row["cancellation"] = f"{cancellation(whole, layout):.3g}"
    return {**row, "frobenius s": f"{middle - start:.0f}", "all modes s": f"{end - middle:.0f}"}


def error(site: Site, weight: Tensor, layout: Layout, factors: Factors, metric: Metric) -> float:
    rest = (weight - decompositions.rebuild(factors, layout)).reshape(*site.matrix)
    assert metric.second_moment is not None
    lost = float(((rest @ metric.second_moment) * rest).sum())
    return lost / decompositions.energy(weight.reshape(*site.matrix), metric)


if __name__ == "__main__":
    main()
