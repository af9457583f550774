"""What calibration keeps of convolutions: moments of patches by group, metrics made from them, and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import tdc
from tdc import decompositions, targets
from tdc.errors import CalibrationError
from tdc.frontends.nn import NnProgram
from tdc.options import Options
from tdc.passes.base import Unit
from tdc.passes.pipeline import PLANNING, Pipeline
from tdc.statistics import Statistics, shrunk
from tdc.testing import assert_close, random_cnn


def images(batches: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(6, 3, 12, 12, generator=generator) for _ in range(batches)]


def gathered(model: nn.Module | None = None, **options: Any) -> Statistics:
    return tdc.calibrate(model or random_cnn(), images(**options), progress=False)


def test_every_convolution_has_the_moment_of_its_patches_by_group() -> None:
    known = gathered()
    shapes = {entry.site.name: tuple(known.moments[entry.moment].shape) for entry in known.sites}
    assert shapes == {
        "0.weight": (1, 27, 27),
        "3.weight": (2, 72, 72),
        "6.weight": (1, 144, 144),
        "9.weight": (1, 24, 24),
        "13.weight": (16, 16),
    }
    assert {e.site.name: (e.rows, e.seen) for e in known.sites if e.site.name != "13.weight"} == {
        "0.weight": (2 * 6 * 144, 2 * 6 * 144),
        "3.weight": (2 * 6 * 36, 2 * 6 * 36),
        "6.weight": (2 * 6 * 36, 2 * 6 * 36),
        "9.weight": (2 * 6 * 36, 2 * 6 * 36),
    }
    ratios = {entry.site.name: entry.ratios for entry in known.sites}
    assert ratios["0.weight"] == {"p": 1.0, "q": 1.0}
    assert ratios["3.weight"] == {"p": 2.0, "q": 2.0}
    assert ratios["13.weight"] == {}


def test_the_moment_of_the_first_layer_is_that_of_unfold() -> None:
    known = gathered()
    rows = torch.cat([functional.unfold(x, 3, 1, 1).mT.reshape(-1, 27) for x in images()]).double()
    entry = next(e for e in known.sites if e.site.name == "0.weight")
    assert_close(known.moments[entry.moment][0], rows.T @ rows / len(rows), 1e-6)
    assert_close(known.means[entry.moment][0], rows.mean(0), 1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_metric_is_centred_where_a_bias_takes_up_the_mean(bias: bool) -> None:
    """The covariance of the patches, shrunk towards its diagonal, and their mean; without a bias the second moment."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=bias)).eval()
    known = gathered(model)
    (entry,) = known.sites
    rows = torch.cat([functional.unfold(x, 3, 1, 1).mT.reshape(-1, 27) for x in images()]).double()
    metric = known.metric(entry, model[0].weight.detach())
    assert metric.second_moment is not None
    centre = rows.mean(0) if bias else torch.zeros(27, dtype=torch.float64)
    spread = (rows - centre).T @ (rows - centre) / len(rows)
    assert_close(metric.second_moment[0], shrunk(spread, len(rows)), 1e-5)
    assert (metric.mean is None) is not bias
    if metric.mean is not None:
        assert_close(metric.mean[0], rows.mean(0), 1e-6)


def test_a_folded_norm_gives_a_convolution_without_a_bias_a_centred_metric() -> None:
    known = gathered(random_cnn(bias=False))
    assert all(entry.site.bias for entry in known.sites)
    assert known.sites[0].site.norm == "1"
    weight = NnProgram(random_cnn(), images()[0])
    site = weight.sites()[0][0]
    assert known.metric(known.sites[0], weight.weight(site)).mean is not None


def test_the_same_data_and_seed_give_the_same_digest_and_other_data_another() -> None:
    big = [torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(1))]
    known = [tdc.calibrate(random_cnn(), big, progress=False) for _ in range(2)]
    assert known[0].digest == known[1].digest
    assert known[0].sites[0].rows == 4096
    assert known[0].sites[0].seen == 8 * 40 * 40
    assert gathered(seed=3).digest != gathered().digest


def test_sampled_moments_predict_as_well_as_all_of_them() -> None:
    """The moment of 4096 sampled positions of 12800 stays within the noise of that many rows."""
    x = functional.avg_pool2d(torch.rand(8, 3, 42, 42, generator=torch.Generator().manual_seed(1)), 3, 1)
    known = tdc.calibrate(random_cnn(), [x], progress=False)
    rows = functional.unfold(x, 3, 1, 1).mT.reshape(-1, 27).double()
    exact = rows.T @ rows / len(rows)
    found = known.moments[known.sites[0].moment][0].double()
    assert float((found - exact).norm() / exact.norm()) < (27 / 4096) ** 0.5


# ---- very wide convolutions


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above 50 inputs per position counts as very wide."""
    monkeypatch.setattr("tdc.statistics.moments.WIDEST", 50)


@pytest.mark.usefixtures("narrow")
def test_a_very_wide_convolution_keeps_the_moment_of_its_outputs() -> None:
    known = gathered()
    sides = {entry.site.name: (entry.side, tuple(known.moments[entry.moment].shape)) for entry in known.sites}
    assert sides == {
        "0.weight": ("input", (1, 27, 27)),
        "3.weight": ("output", (2, 8, 8)),
        "6.weight": ("output", (1, 24, 24)),
        "9.weight": ("input", (1, 24, 24)),
        "13.weight": ("input", (16, 16)),
    }
    remarks = [r.reason for r in known.remarks if r.site == "3.weight"]
    assert any("the moment of its outputs is kept" in reason for reason in remarks)


def test_its_moment_is_that_of_the_outputs_around_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    program = NnProgram(random_cnn(), images()[0])
    site = program.sites()[0][1]
    weight = program.weight(site).double()
    full = gathered()
    monkeypatch.setattr("tdc.statistics.moments.WIDEST", 50)
    wide = gathered()
    moment, mean = full.moments[full.sites[1].moment].double(), full.means[full.sites[1].moment].double()
    spread = moment - mean[:, :, None] * mean[:, None, :]
    matrix = weight.reshape(2, 8, 72)
    found = wide.metric(wide.sites[1], weight)
    assert found.second_moment is None
    assert found.output_moment is not None
    assert_close(found.output_moment, matrix @ spread @ matrix.mT, 1e-4)


@pytest.mark.usefixtures("narrow")
def test_only_what_projects_the_outputs_is_proposed_for_it() -> None:
    program = NnProgram(random_cnn(), images()[0])
    options = Options(budget="params=0.5", progress=False, allocation="uniform")
    unit = Pipeline(PLANNING).run(Unit(program, targets.get("cpu"), options, calibration=images()))
    proposed = {(c.decomposition, c.variant) for c in unit.candidates[1] if not c.is_dense}
    assert proposed
    assert not any(decompositions.get(name).needs_input(variant) for name, variant in proposed)
    others = {(c.decomposition, c.variant) for c in unit.candidates[0] if not c.is_dense}
    assert any(decompositions.get(name).needs_input(variant) for name, variant in others)


@pytest.mark.usefixtures("narrow")
def test_its_error_is_what_is_measured() -> None:
    model = nn.Sequential(random_cnn()[6]).eval()
    data = [torch.randn(8, 16, 10, 10, generator=torch.Generator().manual_seed(k)) + 0.5 for k in range(4)]
    small = tdc.compress(model, budget="params=0.5", calibration=data, progress=False)
    (site,) = tdc.report(small).sites
    with torch.no_grad():
        x = torch.cat(data)
        measured = float((small(x) - model(x)).square().mean() / model(x).square().mean())
    assert site.decomposition != "dense"
    assert measured == pytest.approx(site.error, rel=0.02)


# ---- files


@pytest.mark.parametrize("wide", [False, True])
def test_a_file_of_convolutions_is_read_as_it_was_written(
    tmp_path: Path, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr("tdc.statistics.moments.WIDEST", 50)
    known = gathered()
    known.save(tmp_path / "a.stats")
    again = Statistics.load(tmp_path / "a.stats")
    assert again.digest == known.digest
    for mine, other in zip(known.sites, again.sites, strict=True):
        assert dataclasses.replace(mine, site=other.site) == other
        assert (mine.site, mine.site.bias, mine.site.norm) == (other.site, other.site.bias, other.site.norm)
    again.save(tmp_path / "b.stats")
    assert (tmp_path / "a.stats").read_bytes() == (tmp_path / "b.stats").read_bytes()
    plans = [
        tdc.plan(random_cnn(), images()[0], budget="params=0.5", statistics=s, progress=False).to_json()
        for s in (known, tmp_path / "a.stats")
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("moment", "mean", "message"),
    [
        (torch.eye(27), torch.zeros(1, 27), "must be float32 of shapes"),
        (torch.eye(26)[None], torch.zeros(1, 26), "must be float32 of shapes"),
        (torch.eye(27)[None].double(), torch.zeros(1, 27), "must be float32"),
        (torch.full((1, 27, 27), float("inf")), torch.zeros(1, 27), "not finite"),
        (-torch.eye(27)[None], torch.zeros(1, 27), "diagonal of squares"),
        ((torch.eye(27) + 1).tril()[None], torch.zeros(1, 27), "not symmetric"),
        (torch.eye(27)[None] * 3 - 2, torch.zeros(1, 27), "positive semidefinite"),
    ],
)
def test_a_damaged_moment_is_refused(tmp_path: Path, moment: Tensor, mean: Tensor, message: str) -> None:
    path = tmp_path / "a.stats"
    gathered().save(path)
    save_file({**load_file(path), "moment.0": moment, "mean.0": mean}, path, metadata={"tdc": head_of(path)})
    with pytest.raises(CalibrationError, match=f"damaged at 0.weight.*{message}"):
        Statistics.load(path)


def head_of(path: Path) -> str:
    with safe_open(str(path), framework="pt") as file:
        return str(file.metadata()["tdc"])


@pytest.mark.parametrize(
    "change",
    [
        {"side": "both"},
        {"side": "output"},
        {"seen": 1},
        {"lengths": [["p", 1]]},
        {"lengths": 3},
        {"attributes": {}},
        {"kind": "conv4d"},
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.stats"
    gathered().save(path)
    head = json.loads(head_of(path))
    head["sites"][0] |= change
    save_file(load_file(path), path, metadata={"tdc": json.dumps(head)})
    with pytest.raises(CalibrationError, match=r"a\.stats (cannot be read|is damaged)"):
        Statistics.load(path)
