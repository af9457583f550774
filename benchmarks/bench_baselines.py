"""TDC and published methods at equal parameters or multiply-adds, without gradient steps.

    python benchmarks/bench_baselines.py vgg11 | minilm | smollm2 | check

The parts of the data are those of bench_accuracy.py; the baselines (benchmarks/baselines) have the same ones for their
moments, and the same examples for ASVD's sensitivities. `kept`: of the candidate layers' parameters and multiply-adds.
`--healed`: of methods of one product of two factors a layer, trained by TDC on the same data for as long as its own
fits. `tdc`: with its defaults; `tdc uniform`: the same fits, each layer at the same keep. VBMF takes no budget; TDC is
run at what it keeps. `check`: BALF's allocation against an enumeration.

Rows are added to results/baselines.csv, in place of earlier ones of the same model, method and budget.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from baselines import BASELINES, Answer, Layer, balf_ranks, layers_of, with_weights
from bench_accuracy import CASES
from common import read_rows, write_rows
from torch import Tensor, nn

import tdc
from tdc.frontends.graph import floating_outputs
from tdc.frontends.nn import NnProgram
from tdc.ir import OpKind, Site
from tdc.statistics import divergence, logits_among, without_padding

BUDGETS = {
    "vgg11": ("params=0.2", "params=0.1", "params=0.05", "macs=0.5", "macs=0.25"),
    "minilm": ("params=0.8", "params=0.6", "params=0.4"),
    "smollm2": ("params=0.9", "params=0.8", "params=0.6"),
}
PROBE = {"vgg11": 128, "minilm": 16, "smollm2": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*CASES, "check"])
    parser.add_argument("--methods", nargs="*", default=[*BASELINES, "tdc", "tdc uniform"])
    parser.add_argument("--budgets", nargs="*")
    parser.add_argument("--healed", action="store_true", help="the factors trained then, as TDC's are")
    given = parser.parse_args()
    if given.model == "check":
        return check()
    torch.manual_seed(0)
    case = CASES[given.model]()
    exclude = ("pooler.dense",) if given.model == "minilm" else ()
    statistics = None
    if any(method.startswith("tdc") for method in given.methods):
        statistics = tdc.calibrate(case.model, case.calibration, probe=case.probe, exclude=exclude)
    program = NnProgram(case.model, case.calibration[0])
    sites = [s for s in program.sites()[0] if not any(s.name.startswith(name) for name in exclude)]
    if given.model == "smollm2":
        sites = [site for site in sites if ".layers." in site.name]
    layers = layers_of(program, case.calibration, sites)
    loss = _loss(case, program, layers, PROBE[given.model])
    for budget in given.budgets or BUDGETS[given.model]:
        quantity, _, keep = budget.partition("=")
        for method in given.methods:
            start = time.perf_counter()
            if method in BASELINES:
                with torch.no_grad():
                    found = BASELINES[method](layers, float(keep), quantity, loss)
                if given.healed:
                    measured = case.measured(healed(case, layers, found))
                else:
                    with with_weights(case.model, layers, found.weights) as model:
                        measured = case.measured(model)
                kept = (found.params, found.macs)
            else:
                measured, kept = _tdc(case, budget, statistics, exclude, uniform=method.endswith("uniform"))
            dense = (sum(x.dense for x in layers), sum(x.dense * x.rows for x in layers))
            shares = kept if method.startswith("tdc") else tuple(a / b for a, b in zip(kept, dense, strict=True))
            row = {
                "model": given.model,
                "method": f"{method} healed" if given.healed else method,
                "budget": budget,
                **measured,
                "kept params": f"{shares[0]:.4f}",
                "kept macs": f"{shares[1]:.4f}",
                "seconds": f"{time.perf_counter() - start:.0f}",
            }
            print(row, flush=True)
            keys = ("model", "method", "budget")
            others = [old for old in read_rows("baselines") if any(old.get(key) != row[key] for key in keys)]
            write_rows("baselines", [*others, row])  # a run that is stopped keeps what it found


def _tdc(case: Any, budget: str, statistics: Any, exclude: Any, *, uniform: bool) -> tuple[dict[str, str], Any]:
    small = tdc.compress(
        case.model,
        budget=budget,
        statistics=statistics,
        calibration=case.calibration,
        exclude=exclude,
        allocation="uniform" if uniform else "lagrangian",
    )
    made = tdc.report(small)
    return case.measured(small), (made.after.params / made.before.params, made.after.macs / made.before.macs)


def healed(case: Any, layers: list[Layer], found: Answer) -> nn.Module:
    """The answer's weights as factors, which are exact in their ranks, and then trained."""
    options = {"metric": "weight", "progress": False}
    with with_weights(case.model, layers, found.weights) as model:
        plan = tdc.plan(model, case.calibration[0], budget="params=0.5", allow=("svd", "output_svd"), **options)
        small = tdc.compress(model, case.calibration[0], plan=_ranked(plan, found.ranks), **options)
        with torch.no_grad():
            pair = [floating_outputs(_run(net, case.calibration[0])) for net in (model, small)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)
    return tdc.heal(small, case.model, case.healing, config=case.heal)


def _ranked(plan: tdc.Plan, ranks: Mapping[str, int]) -> tdc.Plan:
    choices = []
    for choice in plan.choices:
        rank = next((ranks[name] for name in choice.site.names if name in ranks), None)
        name = "dense" if rank is None else "svd" if choice.site.kind is OpKind.LINEAR else "output_svd"
        chosen = () if rank is None else (("r", rank),)
        choices.append(replace(choice, decomposition=name, ranks=chosen, variant="", joint=None, hidden=None))
    return replace(plan, choices=tuple(choices))


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _loss(case: Any, program: NnProgram, layers: list[Layer], examples: int) -> Any:
    """How far the outputs move on a few examples of the part for sensitivities."""
    from tdc.frontends.program import head

    (batch,) = program.batches([head(case.probe[0], examples)])
    reference = program.outputs(batch, {})
    logits, real = logits_among(reference), program.unpadded(batch)

    def loss(weights: Mapping[str, Tensor]) -> float:
        with with_weights(case.model, layers, weights):
            pair = (without_padding(outputs, real) for outputs in (reference, program.outputs(batch, {})))
            return divergence(*pair, logits)

    return loss


def check() -> None:
    """BALF's bisection against the best of all choices of four small layers, on its own objective."""
    generator, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        layers, energies = [], []
        for k in range(4):
            weight = torch.randn(7, 8, generator=generator, dtype=torch.float64)
            site = Site(OpKind.LINEAR, (("o", 7), ("i", 8)), "float32", k, (float(k),), (f"layer{k}",))
            layers.append(Layer(site, weight, torch.eye(8, dtype=torch.float64), torch.ones(8), 1.0))
            values = torch.rand(7, generator=generator, dtype=torch.float64).sort(descending=True).values
            energies.append((values.cumsum(0) / values.sum()).tolist())
        ranks = balf_ranks(layers, energies, 0.6, "params")
        spent = sum(x.dense if r is None else x.cost(r) for x, r in zip(layers, ranks, strict=True))
        best = max(
            sum(1.0 if r is None else e[r - 1] for e, r in zip(energies, choice, strict=True))
            for choice in itertools.product([1, 2, 3, None], repeat=4)
            if sum(x.dense if r is None else x.cost(r) for x, r in zip(layers, choice, strict=True)) <= spent
        )
        found = sum(1.0 if r is None else e[r - 1] for e, r in zip(energies, ranks, strict=True))
        wrong += found < best - 1e-9
    print(f"BALF's allocation is the best at what it spends in {20 - wrong} of 20 cases")


if __name__ == "__main__":
    main()
