"""A compressed module learns from the dense one."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.errors import CalibrationError, ModelError, OptionError
from tdc.frontends.graph import floating_outputs
from tdc.frontends.nn.batches import blended, in_parts, runs_by_example, unpadded_in
from tdc.inside import Inside
from tdc.statistics import divergence
from tdc.testing import random_cnn

GENERATOR = torch.Generator().manual_seed(3)
DATA = torch.randn(640, 24, generator=GENERATOR)
TRAIN, TEST = DATA[:512], DATA[512:]
LOW_RANK = ("pivoted", "svd")
CONFIG = tdc.Heal(epochs=20, rate=3e-3, examples=16, patience=20)


def model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(4)
    layers: list[nn.Module] = [nn.Linear(24, 48), nn.Tanh(), nn.LayerNorm(48), nn.Linear(48, 48), nn.Tanh()]
    made = nn.Sequential(*layers, nn.Linear(48, 10)).eval()
    with torch.no_grad():
        for layer in made:
            if isinstance(layer, nn.Linear):
                width = layer.in_features
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 1.5 / width**0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 2)
    return made


def small_of(dense: nn.Module, **options: Any) -> nn.Module:
    data = list(TRAIN.split(128))
    return tdc.compress(dense, budget="params=0.6", allow=LOW_RANK, calibration=data, progress=False, **options)


def change(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return divergence(floating_outputs(dense(x)), floating_outputs(small(x)))


def test_healing_brings_the_outputs_nearer_on_data_that_it_has_not_seen() -> None:
    dense = model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    cut = small_of(dense)
    cured = small_of(dense, heal=CONFIG)
    assert change(dense, cured, TEST) < 0.85 * change(dense, cut, TEST)
    remark = tdc.report(cured).remarks[-1]
    assert remark.stage == "heal"
    assert "->" in remark.reason
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in (*dense.parameters(), *cured.parameters()))
    with torch.no_grad():
        changed = [n for n, p in cured.named_parameters() if not torch.equal(p, cut.get_parameter(n))]
    assert {"2.weight", "2.bias"} < set(changed)


def test_blends_are_of_two_examples_and_of_floating_inputs_only() -> None:
    x, y = torch.randn(6, 3, 4), torch.arange(6.0)
    (first, flag), named = blended(((x, True), {"y": y}), torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    share, order = torch.rand(6, generator=generator), torch.randperm(6, generator=generator)
    assert flag is True
    assert torch.allclose(first, share[:, None, None] * x + (1 - share)[:, None, None] * x[order])
    assert torch.allclose(named["y"], share * y + (1 - share) * y[order])
    for call in (((x, torch.ones(6, dtype=torch.long)), {}), ((x[:1],), {}), ((x, (y,)), {}), ((x, y[:2]), {})):
        assert blended(call, generator) is None


def test_blends_make_more_of_little_data() -> None:
    dense, few = model(), list(TRAIN[:128].split(32))
    cut = tdc.compress(dense, budget="params=0.6", allow=LOW_RANK, calibration=few, progress=False)
    lost = []
    for blends in (0.5, 0.0):
        cured = copy.deepcopy(cut)
        config = tdc.Heal(epochs=40, rate=2e-3, examples=8, patience=40, blends=blends)
        tdc.heal(cured, dense, few, config=config, progress=False)
        lost.append(change(dense, cured, TEST))
    assert lost[0] < 0.97 * lost[1]
    assert lost[1] < change(dense, cut, TEST)


def test_by_default_steps_are_small_where_there_is_little_to_gain() -> None:
    """The less the model was cut, the less far it is moved; it gets better in both cases."""
    dense = model()
    moved = []
    for budget in ("params=0.5", "params=0.7"):
        cut, cured = (
            tdc.compress(dense, budget=budget, calibration=list(TRAIN.split(128)), progress=False, heal=heal)
            for heal in (False, tdc.Heal(epochs=8, examples=16))
        )
        assert change(dense, cured, TEST) < change(dense, cut, TEST)
        pairs = zip(*([p.detach() for p in m.parameters()] for m in (cut, cured)), strict=True)
        moved.append(max(float((a - b).norm() / a.norm()) for a, b in pairs if a.ndim == 2))
    assert moved[1] < 0.7 * moved[0]


def test_what_layers_read_comes_nearer_too() -> None:
    """With it in what is minimised, by more than with the outputs alone; the outputs come nearer in both cases."""
    dense = model()
    cut = tdc.compress(dense, budget="params=0.6", allow="svd", calibration=list(TRAIN.split(128)), progress=False)
    before, lost = inner_distance(cut, cut, dense), []
    for inside in (0.9, 0.0):
        cured = copy.deepcopy(cut)
        config = tdc.Heal(epochs=10, rate=3e-3, examples=16, inside=inside)
        tdc.heal(cured, dense, TRAIN.split(128), config=config, progress=False)
        assert change(dense, cured, TEST) < 0.9 * change(dense, cut, TEST)
        lost.append(inner_distance(cured, cut, dense))
    assert lost[0] < 0.9 * before, lost
    assert lost[0] < 0.9 * lost[1], lost


class Positions(nn.Module):
    """Logits of positions, as language models give them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x)[:, None] * torch.tensor([[1.0], [2.0]])}


def test_by_default_the_inside_is_left_out_for_logits_of_positions() -> None:
    for dense, alone in ((Positions().eval(), True), (model(), False)):
        options: dict[str, Any] = {"budget": "params=0.85", "allow": "svd", "allocation": "uniform", "progress": False}
        cut = tdc.compress(dense, calibration=list(TRAIN.split(128)), **options)
        states = []
        for inside in (None, 0.0, 0.9):
            cured = copy.deepcopy(cut)
            config = tdc.Heal(epochs=4, rate=3e-4, examples=16, inside=inside)
            states.append(tdc.heal(cured, dense, TRAIN.split(128), config=config, progress=False).state_dict())
        same = [all(torch.equal(states[0][name], other[name]) for name in other) for other in states[1:]]
        assert same == [alone, not alone]


def inner_distance(small: nn.Module, start: nn.Module, dense: nn.Module) -> float:
    """Of what layers read, on the test data, weighed as at the start of healing."""
    runs = []
    for model_ in (start, small):
        inside = Inside(model_, dense)
        with torch.no_grad(), inside.reading(dense) as wanted:
            dense(TEST)
        with torch.no_grad(), inside.reading(model_) as given:
            model_(TEST)
        runs.append((wanted, given))
    inside.weigh(runs[:1], 1.0)
    return float(inside.distance(*runs[1]))


def test_averages_heal_where_single_steps_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate at which the parameters after an epoch's last step are worse than the start."""
    dense = model()
    cut = small_of(dense)
    found = []
    for reach in (0.5, 0.0):
        monkeypatch.setattr(sys.modules["tdc.heal"], "_AVERAGED", reach)
        cured = small_of(dense, heal=tdc.Heal(rate=0.1, examples=4, patience=1))
        found.append(change(dense, cured, TEST))
    assert found[0] < 0.9 * found[1]
    assert found[1] == change(dense, cut, TEST)


def test_healing_by_itself_is_that_of_compress_and_repeats_to_the_bit(tmp_path: Path) -> None:
    dense = model()
    cured = small_of(dense, heal=CONFIG)
    other = small_of(dense)
    assert tdc.heal(other, dense, TRAIN.split(128), config=CONFIG, progress=False) is other
    pairs = zip(cured.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    tdc.save(cured, tmp_path / "cured.tdc")
    again = tdc.load(tmp_path / "cured.tdc", model())
    assert torch.equal(again(TEST), cured(TEST))
    assert tdc.report(again).remarks[-1].stage == "heal"


def test_compress_heals_on_the_batches_that_fit_and_on_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model()
    batch = 128 * 24 * 4
    for size, count in ((1, 1), (2 * batch, 2), (4 * batch, 4)):
        monkeypatch.setattr(sys.modules["tdc.passes._backwards"], "_ANCHOR_BYTES", size)
        remarks = tdc.report(small_of(dense, heal=CONFIG)).remarks
        assert f"of {8 * count} held-out steps" in remarks[-1].reason
        told = [r.reason for r in remarks if f"take the first {count} calibration batches" in r.reason]
        assert len(told) == (count < 4)


def test_a_frozen_model_is_healed_and_stays_frozen() -> None:
    dense = model().requires_grad_(False)
    cut, cured = small_of(dense), small_of(dense, heal=CONFIG)
    assert change(dense, cured, TEST) < change(dense, cut, TEST)
    assert not any(p.requires_grad for p in cured.parameters())


def test_a_model_that_cannot_be_made_better_stays_as_it_was() -> None:
    dense = model()
    cut = small_of(dense)
    before = {name: value.clone() for name, value in cut.state_dict().items()}
    tdc.heal(cut, dense, TRAIN.split(128), config=tdc.Heal(epochs=1, rate=0.9), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())
    assert "none of the epochs was better" in tdc.report(cut).remarks[-1].reason


def test_steps_that_are_too_long_are_made_shorter() -> None:
    dense = model()
    cut = small_of(dense)
    before = change(dense, cut, TEST)
    tdc.heal(cut, dense, TRAIN.split(128), config=tdc.Heal(epochs=6, rate=0.9), progress=False)
    assert change(dense, cut, TEST) < 0.9 * before


def test_a_step_without_finite_gradients_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdc.heal import _Work

    loss, calls = _Work._loss, []

    def broken(self: _Work, *args: Any, **options: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return loss(self, *args, **options) * (float("nan") if sum(calls) == 3 and calls[-1] else 1.0)

    monkeypatch.setattr(_Work, "_loss", broken)
    dense = model()
    cut = small_of(dense)
    before = change(dense, cut, TEST)
    tdc.heal(cut, dense, TRAIN.split(128), config=CONFIG, progress=False)
    assert change(dense, cut, TEST) < 0.9 * before


def test_an_interrupted_healing_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, path = model(), tmp_path / "heal.safetensors"
    config = tdc.Heal(epochs=4, rate=3e-3, patience=6, checkpoint=path)
    other = tdc.Heal(epochs=5, rate=3e-3, patience=6, checkpoint=path)
    whole = tdc.heal(small_of(dense), dense, TRAIN.split(128), config=config, progress=False)
    assert not path.exists()
    from tdc.heal import _Work

    epoch = _Work._epoch

    def interrupted(self: _Work, *args: Any) -> None:
        if self.done == 2:
            raise KeyboardInterrupt
        epoch(self, *args)

    monkeypatch.setattr(_Work, "_epoch", interrupted)
    cut = small_of(dense)
    before = {name: value.clone() for name, value in cut.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        tdc.heal(cut, dense, TRAIN.split(128), config=config, progress=False)
    assert path.exists()
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())
    monkeypatch.setattr(_Work, "_epoch", epoch)
    with pytest.raises(OptionError, match=r"^the checkpoint .* belongs to other work"):
        tdc.heal(small_of(dense), dense, TRAIN.split(128), config=other, progress=False)
    resumed = tdc.heal(cut, dense, TRAIN.split(128), config=config, progress=False)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    path.write_bytes(b"broken")
    with pytest.raises(OptionError, match="cannot be read"):
        tdc.heal(small_of(dense), dense, TRAIN.split(128), config=config, progress=False)


def test_a_convolutional_model_is_healed_with_the_outputs_alone_where_the_inside_leads_astray() -> None:
    """Hardly anything in this net matters to its outputs, which are means over images."""
    generator = torch.Generator().manual_seed(4)
    coarse = 2 * torch.randn(320, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    train, test = (images + 0.3 * torch.randn(images.shape, generator=generator)).split([256, 64])
    dense, config = random_cnn(bias=True), tdc.Heal(epochs=6, rate=2e-3, examples=16, patience=6)
    options: dict[str, Any] = {"budget": "params=0.15", "calibration": list(train.split(64)), "progress": False}
    cut, cured = tdc.compress(dense, **options), tdc.compress(dense, heal=config, **options)
    assert change(dense, cured, test) < 0.95 * change(dense, cut, test)


class Odd(nn.Module):
    """A network whose forward does what forwards of users do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.tensor(1.5))
        self.body, self.beside = model(), nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if self.how == "in place":
            x.sub_(0.1).mul_(0.5)
        if self.how == "random":
            x = nn.functional.dropout(x, 0.3)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no gradient"):
            given = self.body(x) * self.scale
            return given if extra is None else given + self.beside(extra)


class ScaleNorm(Odd):
    """Named like a normalisation, so that its parameters are trained."""


@pytest.mark.parametrize("how", ["", "in place", "random", "at times"])
def test_odd_forwards_are_healed(how: str) -> None:
    dense = ScaleNorm(how).eval()
    data: list[Any] = [x.clone() for x in TRAIN.split(64)]
    data = [{"x": x, "extra": x + 1} if how == "at times" and k % 3 else {"x": x} for k, x in enumerate(data)]
    kept = [batch["x"].clone() for batch in data]
    cut = tdc.compress(dense, budget="params=0.6", allow="svd", calibration=data, progress=False)
    assert {"scale"} < {name for name, _ in cut.named_parameters()}
    cured = tdc.heal(copy.deepcopy(cut), dense, data, config=CONFIG, progress=False)
    remark = tdc.report(cured).remarks[-1].reason
    before, after = (float(value) for value in re.findall(r": (\S+) -> (\S+);", remark)[0])
    assert after < (0.9 if how in ("random", "in place") else 1.0) * before
    assert all(torch.equal(batch["x"], x) for batch, x in zip(data, kept, strict=True))
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in cut.parameters()]
    for p, gradient in zip(cut.parameters(), gradients, strict=True):
        p.grad = gradient
    tdc.heal(cut, dense, data, config=CONFIG, progress=False)
    pairs = zip(cut.parameters(), cured.parameters(), gradients, strict=True)
    assert all(torch.equal(a, b) and a.grad is gradient for a, b, gradient in pairs)


def test_a_forward_without_gradients_is_refused() -> None:
    dense = Odd("no gradient").eval()
    cut = tdc.compress(dense, budget="params=0.6", allow="svd", calibration=TRAIN.split(64), progress=False)
    with pytest.raises(ModelError, match="no gradient"):
        tdc.heal(cut, dense, TRAIN.split(64), progress=False)


def test_batches_are_cut_only_where_their_first_axis_counts_examples() -> None:
    x, state = torch.randn(70, 5, 3), (torch.randn(2, 70, 4), torch.randn(2, 70, 4))
    parts = [*in_parts(((x, [x[:, 0]]), {"y": {"z": x}}), 32)]
    assert [len(args[0]) for args, _ in parts] == [32, 32, 6]
    assert all(torch.equal(args[1][0], args[0][:, 0]) and torch.equal(kw["y"]["z"], args[0]) for args, kw in parts)
    assert [*in_parts(((x, state), {}), 32)] == [((x, state), {})]
    convolution = nn.Conv1d(40, 16, 3)
    assert runs_by_example(convolution, ((torch.randn(40, 40, 9),), {}), 32)
    assert not runs_by_example(convolution, ((torch.randn(40, 30),), {}), 32)
    with pytest.raises(CalibrationError, match="cannot run on a batch"):
        runs_by_example(convolution, ((torch.randn(70, 30),), {}), 32)


def test_inputs_of_a_decoder_are_not_padded_where_those_of_its_encoder_are() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    call = (), {"x": torch.zeros(2, 3), "attention_mask": mask}
    for two, found in ((False, True), (True, False)):
        net = nn.Identity()
        net.config = SimpleNamespace(is_encoder_decoder=two)
        assert (unpadded_in(net, call) is not None) is found


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"rate": 0.0}, {"examples": 0}, {"held_out": 0.9}, {"inside": 1.0}, {"patience": 0}]
)
def test_a_wrong_configuration_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}="):
        tdc.Heal(**wrong)


def test_what_cannot_be_healed_is_refused() -> None:
    dense = model()
    cut = small_of(dense)
    with pytest.raises(ModelError, match="no factored layer"):
        tdc.heal(model(), dense, [TRAIN], progress=False)
    with pytest.raises(CalibrationError, match="at least 2 steps"):
        tdc.heal(cut, dense, [TRAIN[:8]], progress=False)
    with pytest.raises(CalibrationError, match="cannot run on a batch"):
        tdc.heal(cut, dense, [torch.randn(64, 7)], progress=False)
    with pytest.raises(ModelError, match="do not give the same outputs"):
        tdc.heal(cut, nn.Sequential(nn.Linear(24, 3)).eval(), [TRAIN], progress=False)
    with pytest.raises(ModelError, match="float32 or float64"):
        tdc.heal(small_of(dense).bfloat16(), dense, [TRAIN], progress=False)
    with pytest.raises(OptionError, match="heal= needs calibration data"):
        tdc.compress(dense, (TRAIN,), budget="params=0.5", heal=True, progress=False)
    with pytest.raises(OptionError, match="heal= needs the dense model"):
        tdc.compress(dense, budget="params=0.5", calibration=[TRAIN], heal=True, inplace=True, progress=False)
