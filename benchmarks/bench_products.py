"""Products of float32 matrices by the library that calibration and healing of modules use, against PyTorch's choice.

    python benchmarks/bench_products.py

`product`: one of 1024 x 576 x 1536, as in a layer of SmolLM2. `minilm`: forwards and backwards of all-MiniLM-L6-v2 on
16 sentences, what a step of calibration or healing mostly is. In turn, 25 repeats, with the threads that torch has;
`error`: relative, of the product, against float64. Where the libraries do not differ, or oneDNN is not as exact, both
are the same. Rows are added to results/products.csv, in place of earlier ones of the same case and threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import read_rows, write_rows

from tdc.demo import Encoder, load_minilm, sentences
from tdc.frontends.nn.products import fast_products

WAYS: dict[str, Any] = {"torch": nullcontext, "tdc": fast_products}
REPEATS = 25


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator) for shape in ((1024, 576), (576, 1536)))
    exact = first.double() @ second.double()
    model, tokenizer = load_minilm()
    (batch,) = Encoder(tokenizer).batches(sentences()[:16])

    def step() -> None:
        model.zero_grad()
        model(**batch).last_hidden_state.square().mean().backward()

    cases: dict[str, Callable[[], Any]] = {"product": lambda: first @ second, "minilm": step}
    for case, run in cases.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        errors = {}
        for _ in range(2 + REPEATS):
            for way, within in WAYS.items():
                with within():
                    errors[way] = float((first @ second - exact).norm() / exact.norm())
                    start = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - start)
        least, middle = ({way: of(t[2:]) for way, t in times.items()} for of in (min, statistics.median))
        row = {
            "case": case,
            "threads": str(torch.get_num_threads()),
            "ms": f"{1e3 * least['torch']:.3g}",
            "part of the time": f"{least['tdc'] / least['torch']:.2f}",
            "by median": f"{middle['tdc'] / middle['torch']:.2f}",
            "error": f"{errors['tdc']:.2g}",
            "error of torch": f"{errors['torch']:.2g}",
        }
        print(row)
        keys = ("case", "threads")
        write_rows("products", [*(o for o in read_rows("products") if any(o[k] != row[k] for k in keys)), row])


if __name__ == "__main__":
    main()
