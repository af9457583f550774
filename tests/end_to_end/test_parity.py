"""One plan for both doors, on a real trained transformer (all-MiniLM-L6-v2) and its two kinds of ONNX export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import tdc
from tdc.demo import Encoder, export_onnx, load_minilm, sentences

STEP = 8
KEEP = "params=0.6"


class Case:
    """The model, its exports and three disjoint parts of the sentences."""

    def __init__(self, folder: Path) -> None:
        self.model, tokenizer = load_minilm()
        self.encoder, texts = Encoder(tokenizer, length=48), sentences()[::10]
        parts = (texts[:192], texts[192:200], texts[200:232])
        self.calibration, self.probe, self.held_out = (self.encoder.batches(part) for part in parts)
        self.exports = {optimize: folder / f"minilm_{optimize}.onnx" for optimize in (True, False)}
        for optimize, path in self.exports.items():
            export_onnx(self.model, path, optimize=optimize)
        self.statistics = tdc.calibrate(self.model, self.calibration, probe=self.probe, progress=False)
        self.plan = tdc.plan(self.model, self.calibration[0], budget=KEEP, statistics=self.statistics, progress=False)

    def onnx_batches(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, np.ndarray]]:
        names = ("input_ids", "attention_mask")
        return [{name: batch[name].numpy() for name in names} for batch in batches]

    def cosine(self, **options: Any) -> float:
        """Mean cosine of held-out embeddings with the dense ones."""
        small = tdc.compress(
            self.model, self.calibration[0], budget=KEEP, statistics=self.statistics, progress=False, **options
        )
        pair = [self.encoder.of_module(model, self.held_out) for model in (self.model, small)]
        return float((pair[0] * pair[1]).sum(-1).mean())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("minilm"))


def test_all_encoder_linears_are_rewritten(case: Case) -> None:
    replaced = [choice.site.name for choice in case.plan.choices if not choice.is_dense]
    assert sum(name.startswith("encoder.") for name in replaced) >= 36


@pytest.mark.parametrize("optimize", [True, False])
def test_one_statistics_file_gives_equal_plans(case: Case, optimize: bool, tmp_path: Path) -> None:
    case.statistics.save(tmp_path / "stats.safetensors")
    plan = tdc.plan(case.exports[optimize], budget=KEEP, statistics=tmp_path / "stats.safetensors", progress=False)
    assert plan == case.plan
    assert {c.site.name for c in plan.choices} == {c.site.name for c in case.plan.choices}


@pytest.mark.parametrize("optimize", [True, False])
def test_own_statistics_move_ranks_by_one_step_at_most(case: Case, optimize: bool) -> None:
    batches, probe = case.onnx_batches(case.calibration), case.onnx_batches(case.probe)
    theirs = tdc.calibrate(case.exports[optimize], batches, probe=probe, progress=False)
    assert theirs.metric_name == "input"  # onnxruntime runs nothing backwards
    ours = tdc.calibrate(case.model, case.calibration, probe=case.probe, metric="input", progress=False)
    plan = tdc.plan(case.exports[optimize], budget=KEEP, statistics=theirs, progress=False)
    own = tdc.plan(case.model, case.calibration[0], budget=KEEP, statistics=ours, progress=False)
    ranks = {choice.site.sketch: dict(choice.ranks).get("r", 0) for choice in plan.choices}
    moves = [abs(dict(c.ranks).get("r", 0) - ranks[c.site.sketch]) for c in own.choices]
    assert max(moves) <= STEP
    assert sum(move > 0 for move in moves) <= 0.05 * len(moves)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_plan_file_moves_between_the_doors(case: Case, optimize: bool, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(case.plan.to_json())
    out = tmp_path / "small.onnx"
    options = {"plan": tmp_path / "plan.json", "statistics": case.statistics, "progress": False}
    report = tdc.compress_onnx(case.exports[optimize], out, **options)
    small = tdc.compress(case.model, case.calibration[0], **options)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(small).double()
    for batch, arrays in zip(case.held_out, case.onnx_batches(case.held_out), strict=True):
        with torch.no_grad():
            given = {name: torch.from_numpy(array) for name, array in arrays.items()}
            ours, wanted = small(**given), exact(**given)
        hidden, pooled = session.run(["last_hidden_state", "pooler_output"], arrays)
        for theirs, name in ((hidden, "last_hidden_state"), (pooled, "pooler_output")):
            lost = (ours[name].double() - wanted[name]).norm()
            assert (torch.from_numpy(theirs).double() - wanted[name]).norm() <= 2 * lost
        assert batch["input_ids"].shape == hidden.shape[:2]
    assert report.replaced == tdc.report(small).replaced >= 36
    assert out.stat().st_size < case.exports[optimize].stat().st_size
    assert report.files == (case.exports[optimize].stat().st_size, out.stat().st_size)
    assert tdc.report(out) == report


def test_fidelity_comes_in_the_order_of_the_theory(case: Case) -> None:
    uniform = {"allocation": "uniform"}
    frobenius = case.cosine(allow="svd", metric="weight", **uniform)
    weighted = case.cosine(allow="svd", **uniform)
    pivoted = case.cosine(allow="pivoted", **uniform)
    allocated = case.cosine()
    assert frobenius < weighted < pivoted < allocated
