from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tdc
from tdc.errors import CalibrationError
from tdc.ir import Remark
from tdc.statistics import Importance, SiteStatistics, Statistics
from tdc.testing import random_metric, random_mlp, random_site, random_weight


def example() -> Statistics:
    moment = random_metric(8).second_moment
    assert moment is not None
    sites = tuple(random_site(random_weight(12, 8, seed=k), order=k, name=f"layer{k}.weight") for k in range(2))
    entries = (SiteStatistics(sites[0], 0, 32, 0.5, seen=32), SiteStatistics(sites[1], 0, 32, 2.0, seen=40))
    importance = Importance("one batch", (torch.arange(3.0), torch.ones(2)), (1, -1))
    remarks = (Remark("", "calibrate", "few rows"),)
    return Statistics(entries, (moment.float(),), (torch.arange(8.0),), 3, remarks, importance=(importance,))


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    known = example()
    known.save(tmp_path / "a.stats")
    again = Statistics.load(tmp_path / "a.stats")
    assert (again.sites, again.batches, again.remarks) == (known.sites, known.batches, known.remarks)
    assert [entry.site.names for entry in again.sites] == [("layer0.weight",), ("layer1.weight",)]
    assert torch.equal(again.moments[0], known.moments[0])
    assert torch.equal(again.means[0], known.means[0])
    assert again.digest == known.digest
    (found,) = again.importance_of([entry.site for entry in known.sites]).values()
    assert {order: rows.tolist() for order, rows in found.items()} == {0: [1.0, 1.0]}
    again.save(tmp_path / "b.stats")
    assert (tmp_path / "a.stats").read_bytes() == (tmp_path / "b.stats").read_bytes()


def test_the_digest_knows_the_content_and_not_the_names() -> None:
    known = example()
    renamed = dataclasses.replace(known.sites[0].site, names=("other",))
    first = dataclasses.replace(known.sites[0], site=renamed)
    assert dataclasses.replace(known, sites=(first, known.sites[1])).digest == known.digest


@pytest.mark.parametrize(
    "change",
    [
        {"moments": (torch.eye(8),)},
        {"means": (torch.zeros(8),)},
        {"sites": (dataclasses.replace(example().sites[0], sensitivity=0.25), example().sites[1])},
        {"sites": (dataclasses.replace(example().sites[0], probes=((0.03, 0.5),)), example().sites[1])},
        {"sites": (dataclasses.replace(example().sites[0], rows=31), example().sites[1])},
        {"sites": (dataclasses.replace(example().sites[0], seen=99), example().sites[1])},
        {"sites": (dataclasses.replace(example().sites[0], lengths=(("p", 8, 4),)), example().sites[1])},
        {"sites": example().sites[:1]},
    ],
)
def test_the_digest_changes_with_the_content(change: dict[str, Any]) -> None:
    assert dataclasses.replace(example(), **change).digest != example().digest


def test_sites_are_found_by_their_weights() -> None:
    known = example()
    here = [random_site(random_weight(12, 8, seed=k), order=10 + k, name="renamed") for k in (1, 0, 7)]
    found = known.of(here)
    assert {order: entry.sensitivity for order, entry in found.items()} == {11: 2.0, 10: 0.5}


def tampered(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """The example as a file with other tensors or another head; a change to None takes the key away."""
    from safetensors import safe_open

    example().save(path)
    with safe_open(str(path), framework="pt") as file:
        head = json.loads(file.metadata()["tdc"])
    head = {key: value for key, value in {**head, **changes}.items() if value is not None}
    kept = load_file(path)
    kept = kept if tensors is None else {**tensors, "importance.0": kept["importance.0"]}
    save_file(kept, path, metadata={"tdc": json.dumps(head)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a TDC statistics file"),
        ({"version": 99}, "not a TDC statistics file of version"),
        ({"sites": None}, "cannot be read"),
        ({"sites": [{"moment": 0}]}, "cannot be read"),
        ({"sites": [3]}, "cannot be read"),
        ({"tensors": {"mean.0": torch.zeros(8)}}, "cannot be read"),
        (
            {"tensors": {"moment.0": torch.eye(7), "mean.0": torch.zeros(8)}},
            "damaged at layer0.weight: the moments must be",
        ),
        ({"tensors": {"moment.0": torch.full((8, 8), float("nan")), "mean.0": torch.zeros(8)}}, "not finite"),
        ({"tensors": {"moment.0": -torch.eye(8), "mean.0": torch.zeros(8)}}, "diagonal of squares"),
        ({"tensors": {"moment.0": (torch.eye(8) + 1.0).tril(), "mean.0": torch.zeros(8)}}, "not symmetric"),
        ({"tensors": {"moment.0": torch.eye(8) * 3 - 2, "mean.0": torch.zeros(8)}}, "positive semidefinite"),
        ({"tensors": {"moment.0": torch.eye(8).half(), "mean.0": torch.zeros(8)}}, "must be float32"),
        ({"batches": 0}, "cannot be read"),
        ({"importance": [["one batch", [3, 1], [1, -1]]]}, "impossible importance"),
        ({"importance": [["one batch", [3, 2], [2, -1]]]}, "impossible importance"),
        ({"importance": [["one batch", [3, 2], [1]]]}, "impossible importance"),
        ({"importance": [["one batch", [3, 2]]]}, "cannot be read"),
        ({"importance": [["one batch", [5], [0, 0]]] * 2}, "cannot be read"),
        ({"remarks": 5}, "cannot be read"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Statistics.load(tampered(tmp_path / "a.stats", **changes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"moment": -1},
        {"moment": 7},
        {"sensitivity": float("nan")},
        {"sensitivity": -1},
        {"rows": 0},
        {"seen": 2},
        {"side": "both"},
    ],
)
def test_a_file_with_impossible_numbers_is_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    row = {**example().sites[0].site.to_dict(), "moment": 0, "rows": 3, "seen": 3, "sensitivity": 1.0, **wrong}
    with pytest.raises(CalibrationError, match=r"a\.stats cannot be read"):
        Statistics.load(tampered(tmp_path / "a.stats", sites=[row]))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    example().save(tmp_path / "a.stats")
    whole = (tmp_path / "a.stats").read_bytes()
    (tmp_path / "a.stats").write_bytes(whole[:keep])
    with pytest.raises(CalibrationError, match=r"a\.stats cannot be read"):
        Statistics.load(tmp_path / "a.stats")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no statistics file"):
        Statistics.load(tmp_path / "none.stats")


def test_a_saved_file_plans_like_the_statistics_themselves(tmp_path: Path) -> None:
    known = tdc.calibrate(random_mlp(), [torch.randn(64, 24)], progress=False)
    known.save(tmp_path / "a.stats")
    plans = [
        tdc.plan(random_mlp(), torch.zeros(1, 24), budget="params=0.5", statistics=given, progress=False).to_json()
        for given in (known, tmp_path / "a.stats", str(tmp_path / "a.stats"))
    ]
    assert plans[0] == plans[1] == plans[2]
    assert known.digest in plans[0]


def test_between_two_probes_the_change_of_the_output_is_a_power_of_the_error(tmp_path: Path) -> None:
    known = example()
    entry = dataclasses.replace(known.sites[0], sensitivity=0.5, probes=((0.02, 0.5), (0.32, 8.0)))
    assert [entry.sensitivity_at(e) for e in (0.01, 0.02)] == pytest.approx([0.25, 0.5])
    assert entry.sensitivity_at(0.0) == entry.sensitivity_at(1e-9) > 0
    steep = dataclasses.replace(entry, probes=((0.02, 0.5), (0.04, 4.0)))
    assert steep.sensitivity_at(0.01) == pytest.approx(0.25)  # of the second order, at most
    assert entry.sensitivity_at(0.08) == pytest.approx(2.0)
    assert [entry.sensitivity_at(e) for e in (0.32, 1.0)] == pytest.approx([8.0, 8.0])
    falling = dataclasses.replace(entry, probes=((0.02, 0.5), (0.32, 1e-9)))
    losses = [e * falling.sensitivity_at(e) for e in (0.01, 0.02, 0.05, 0.1, 0.32, 0.9)]
    assert losses == sorted(losses)
    assert known.sites[0].sensitivity_at(0.7) == known.sites[0].sensitivity
    three = dataclasses.replace(entry, sensitivity=0.02, probes=((1e-4, 0.02), (0.01, 0.2), (0.04, 0.4)))
    found = [three.sensitivity_at(e) for e in (1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.04, 0.5)]
    assert found == pytest.approx([0.02 * 0.1**0.5, 0.02, 0.02 * 10**0.5, 0.2, 0.2 * 2**0.5, 0.4, 0.4])
    changed = dataclasses.replace(known, sites=(three, known.sites[1]))
    changed.save(tmp_path / "known")
    assert Statistics.load(tmp_path / "known").sites == changed.sites
