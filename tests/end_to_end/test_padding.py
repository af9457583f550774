"""What stands in the padding of a batch changes nothing: statistics, fits and healing are those of the real tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.fx.export import open_exported
from tdc.frontends.program import unpadded_of
from tdc.statistics import without_padding
from tdc.statistics.patches import unpadded_rows
from tdc.testing import random_site, random_weight
from tdc.torch_backend import tdc_backend

WIDTH, WORDS, TOKENS = 16, 40, 7
BUDGET = "params=0.6"


class Reader(nn.Module):
    """A layer of a transformer that attends to what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = self.q(x) @ self.k(x).mT / WIDTH**0.5
        scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        x = x + self.o(scores.softmax(-1) @ self.v(x))
        return x + self.down(self.up(x).relu())


def batches(padding: int, count: int = 6) -> list[dict[str, Tensor]]:
    """Sentences of 2 to 7 tokens, the same ones for every token that stands in the padding."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(1, WORDS, (8, TOKENS), generator=generator)
        mask = (torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (8, 1), generator=generator)).long()
        found.append({"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask})
    return found


@pytest.fixture
def model() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


def exported(model: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "reader.onnx"
    axes = {"input_ids": {0: "b", 1: "t"}, "attention_mask": {0: "b", 1: "t"}}
    torch.onnx.export(
        model,
        tuple(batches(0)[0].values()),
        path,
        dynamo=True,
        input_names=[*axes],
        dynamic_shapes={name: dict.fromkeys(own, torch.export.Dim.DYNAMIC) for name, own in axes.items()},
        external_data=False,
    )
    return path


def same(first: tdc.Statistics, second: tdc.Statistics) -> None:
    assert len(first.moments) == len(second.moments) > 0
    for name in ("moments", "means", "gradients"):
        for one, other in zip(getattr(first, name), getattr(second, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(first.sites, second.sites, strict=True):
        assert one.rows == other.rows
        assert one.sensitivity == pytest.approx(other.sensitivity, rel=1e-3)


@pytest.mark.parametrize("metric", ["input", "fisher"])
@pytest.mark.parametrize("positional", [False, True])
def test_statistics_of_modules(model: Reader, metric: str, positional: bool) -> None:
    data = [[(*b.values(),) if positional else b for b in batches(padding)] for padding in (0, 3)]
    first, second = (tdc.calibrate(model, own, metric=metric, progress=False) for own in data)
    same(first, second)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches(0))
    assert {entry.rows for entry in first.sites} == {real}
    assert {entry.seen for entry in first.sites} == {6 * 8 * TOKENS}
    assert any(f"{6 * 8 * TOKENS - real} positions are padding" in remark.reason for remark in first.remarks)


def test_without_the_mask_padding_counts(model: Reader) -> None:
    """That the test above can fail."""
    ones = [[{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in batches(p)] for p in (0, 3)]
    first, second = (tdc.calibrate(model, own, metric="input", progress=False) for own in ones)
    assert not torch.allclose(first.moments[0], second.moments[0], rtol=1e-2)
    assert {entry.rows for entry in first.sites} == {6 * 8 * TOKENS}


def test_statistics_of_the_real_tokens_alone(model: Reader) -> None:
    """Each sentence by itself, without padding, gives the same sums."""
    alone = [
        {name: values[k : k + 1, : int(batch["attention_mask"][k].sum())] for name, values in batch.items()}
        for batch in batches(0)
        for k in range(8)
    ]
    first, second = (tdc.calibrate(model, own, metric="input", progress=False) for own in (batches(0), alone))
    for one, other in zip(first.moments, second.moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_statistics_of_files_and_graphs_are_those_of_modules(model: Reader, tmp_path: Path) -> None:
    path = exported(model, tmp_path)
    arrays = [{name: np.asarray(values) for name, values in batch.items()} for batch in batches(3)]
    ours = tdc.calibrate(model, batches(0), metric="input", progress=False)
    theirs = tdc.calibrate(path, arrays, metric="input", progress=False)
    pairs = {entry.site.name: entry for entry in theirs.sites}
    for entry in ours.sites:
        other = pairs[entry.site.name]
        torch.testing.assert_close(ours.moments[entry.moment], theirs.moments[other.moment], rtol=1e-3, atol=1e-5)
        assert entry.rows == other.rows
        assert entry.sensitivity == pytest.approx(other.sensitivity, rel=1e-2)


def test_graphs_know_the_mask_by_its_name(model: Reader) -> None:
    batch = batches(0)[0]
    program = open_exported(torch.export.export(model, (), batch))
    (read,) = program.batches([batch])
    found = program.unpadded(read)
    assert found is not None
    assert torch.equal(found, batch["attention_mask"] == 1)


@pytest.mark.usefixtures("dynamo")
def test_compiled_models_leave_padding_out(model: Reader) -> None:
    outputs = []
    for padding in (0, 3):
        torch._dynamo.reset()
        fast = torch.compile(
            copy.deepcopy(model),
            backend=tdc_backend,
            options={"budget": BUDGET, "inner": "eager", "calibrate_calls": 6},
        )
        with torch.no_grad():
            for batch in batches(padding):
                fast(**batch)
            tdc.wait(fast, timeout=120)
            outputs.append(fast(**batches(0)[0]))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", ["input", "fisher"])
def test_anchored_fits(model: Reader, metric: str) -> None:
    statistics = tdc.calibrate(model, batches(0), metric=metric, progress=False)
    plan = tdc.plan(model, batches(0)[0], budget=BUDGET, statistics=statistics, metric=metric, progress=False)
    options: dict[str, Any] = {"plan": plan, "statistics": statistics, "progress": False}
    first, second = (tdc.compress(model, batches(0)[0], calibration=batches(padding), **options) for padding in (0, 3))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_healing(model: Reader) -> None:
    kept = []
    for padding in (0, 3):
        small = tdc.compress(model, batches(0)[0], budget="params=0.4", progress=False)
        tdc.heal(small, model, batches(padding), config=tdc.Heal(epochs=2, examples=8), progress=False)
        kept.append(small)
    (remark,) = (r.reason for r in tdc.report(kept[0]).remarks if r.stage == "heal")
    assert "->" in remark
    for one, other in zip(kept[0].parameters(), kept[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_tells_padding() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for values in (mask, mask.bool(), mask.float(), mask.numpy()):
        found = unpadded_of({"attention_mask": values})
        assert found is not None
        assert torch.equal(found, mask == 1)
    assert unpadded_of({}) is None
    assert unpadded_of({"mask": mask}) is None
    assert unpadded_of({"attention_mask": torch.ones(2, 3)}) is None
    assert unpadded_of({"attention_mask": torch.zeros(2, 3)}) is None
    assert unpadded_of({"attention_mask": mask * -1e9}) is None
    assert unpadded_of({"attention_mask": mask[:, None]}) is None
    assert unpadded_of({"attention_mask": mask, "decoder_input_ids": mask}) is None


def test_what_has_other_axes_stays_whole() -> None:
    unpadded = torch.tensor([[True, True, False], [True, False, False]])
    site = random_site(random_weight(4, 5, seed=0))
    assert unpadded_rows(site, torch.zeros(2, 3, 5), unpadded) is not None
    assert unpadded_rows(site, torch.zeros(6, 5), unpadded) is not None
    assert unpadded_rows(site, torch.zeros(3, 2, 5), unpadded) is None
    assert unpadded_rows(site, torch.zeros(2, 5), unpadded) is None
    hidden, pooled = torch.randn(2, 3, 5), torch.randn(2, 3)
    found = without_padding({"hidden": hidden, "pooled": pooled}, unpadded)
    assert torch.equal(found["hidden"], hidden[unpadded])
    assert found["pooled"] is pooled
