"""Modules of many makes through the module door: what each of them once broke, on tiny random configurations."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import FactoredLinear
from tdc.statistics import Collector
from tdc.testing import assert_close, random_mlp, random_site, random_weight

IDS = torch.arange(3, 17).reshape(2, 7)
X = torch.linspace(-1, 1, 32 * 24).reshape(32, 24).sin()


def compressed(model: nn.Module, x: Any = X, keep: float = 0.6, **options: Any) -> Any:
    return tdc.compress(model, x, budget=f"params={keep}", calibration=[x], progress=False, **options)


class Net(nn.Module):
    """A body that subclasses call as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.body = random_mlp()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Shared(nn.Module):
    """One module under two names, its weight tied to another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.b, self.c = self.a, nn.Linear(24, 24)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("make", [Shared, Counting])
def test_calibration_leaves_weights_ties_and_buffers_as_they_were(make: type[nn.Module]) -> None:
    model = make()
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compressed(model)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert any(isinstance(module, FactoredLinear) for module in small.modules())


def test_what_is_written_to_between_two_layers_is_two_inputs() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 8), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            x.mul_(10)
            return y + self.b(x)

    known = tdc.calibrate(InPlace(), [X], progress=False)
    first, second = (known.moments[entry.moment] for entry in known.sites)
    assert_close(second, 100 * first, 1e-6)


def test_a_layer_in_a_loop_keeps_one_sum_for_all_its_steps() -> None:
    collector = Collector()
    sites = [random_site(random_weight(3, 4, seed=k), order=k) for k in range(2)]
    rows = torch.randn(50, 6, 4)
    for step in rows:
        activation = step.clone()
        for site in sites:
            collector.tap(site, activation)
        del activation
        assert len(collector._batch) <= 3
    collector.end_batch()
    assert collector.group == {0: 0, 1: 0}
    flat = rows.reshape(-1, 4).double()
    assert_close(collector.moments[0].total[0], flat.T @ flat, 1e-6)
    assert collector.moments[0].rows == 300


def test_noise_in_the_model_moves_neither_the_plan_nor_the_users_random_numbers() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + torch.randn_like(x))

    model = Noisy()
    state = torch.get_rng_state()
    digests = {tdc.calibrate(model, [X], progress=False).digest for _ in range(2)}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fused_transformer_encoder_is_calibrated_counted_and_left_switched_on() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    batch = {"src": torch.randn(3, 7, 32), "src_key_padding_mask": mask}
    small = compressed(model, batch, 0.5)
    report = tdc.report(small)
    assert report.replaced == 4
    assert 0 < report.model_after.macs < report.model_before.macs
    assert torch.backends.mha.get_fastpath_enabled()


@dataclass
class Answer:
    logits: Tensor
    note: str


def test_a_dataclass_is_an_output() -> None:
    class Answering(Net):
        def forward(self, x: Tensor) -> Answer:
            return Answer(self.body(x), "mine")

    small = compressed(Answering())
    assert tdc.report(small).replaced >= 1
    assert small(X).note == "mine"


def test_weights_of_inference_mode_and_of_a_data_parallel_module_are_read() -> None:
    with torch.inference_mode():
        frozen = random_mlp()
    assert tdc.report(compressed(frozen)).replaced >= 1
    assert tdc.report(compressed(nn.DataParallel(random_mlp()))).replaced >= 1


def unnamed(model: nn.Module) -> nn.Module:
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.trace(random_mlp(), X), "TorchScript"),
        (lambda: random_mlp().to("meta"), "meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), "not initialized"),
        (lambda: nn.Linear(24, 16), "nn.Sequential"),
        (lambda: unnamed(Net()), "inplace=True"),
    ],
    ids=["torchscript", "meta", "lazy", "bare", "lock"],
)
def test_modules_that_cannot_be_rewritten_are_refused_with_a_reason(make: Any, reason: str) -> None:
    with pytest.raises(tdc.ModelError, match=reason):
        compressed(make())


def test_a_scripted_part_of_a_module_is_passed_over() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(24, 24)), random_mlp())
    assert tdc.report(compressed(model)).replaced >= 1


def test_saving_what_could_not_be_loaded_is_refused(tmp_path: Path) -> None:
    class Stateful(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    twice = compressed(compressed(random_mlp(), exclude="0"), keep=0.5)
    for model, reason in ((twice, "earlier compression"), (compressed(Stateful()), "_extra_state")):
        with pytest.raises(tdc.ModelError, match=reason):
            tdc.save(model, tmp_path / "small.tdc")
    assert not list(tmp_path.iterdir())


# ---- transformers

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def made(name: str, kind: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**{**SIZES, **more})).eval()


MODELS = {
    "deberta": lambda: made(
        "DebertaV2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
    "gpt-neox": lambda: made("GPTNeoX", "GPTNeoXForCausalLM"),
    "mixtral": lambda: made("Mixtral", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4),
    "t5": lambda: made(
        "T5", "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=1, decoder_start_token_id=2
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_save_pretrained_is_loaded_again(tmp_path: Path, name: str) -> None:
    """Mixtral and GPT-NeoX are renamed on saving; DeBERTa calls a module on a parameter; T5 asks for
    ``wo.weight.dtype``.
    """
    model = MODELS[name]()
    batch = {"input_ids": IDS, "labels": IDS} if name == "t5" else {"input_ids": IDS}
    small = compressed(model, batch)
    assert tdc.report(small).replaced >= 3
    small.save_pretrained(tmp_path / "folder")
    tdc.save(small, tmp_path / "small.tdc")
    again = [tdc.load(tmp_path / "folder", MODELS[name]()), tdc.load(tmp_path / "small.tdc", MODELS[name]())]
    again[1].save_pretrained(tmp_path / "second")
    again.append(tdc.load(tmp_path / "second", MODELS[name]()))
    expected = small(**batch).logits
    assert all(torch.equal(loaded(**batch).logits, expected) for loaded in again)


def test_buffers_that_no_file_holds_may_not_stay_on_meta(tmp_path: Path) -> None:
    model = made("Llama", "LlamaForCausalLM")
    tdc.save(compressed(model, {"input_ids": IDS}), tmp_path / "small.tdc")
    with torch.device("meta"):
        empty = made("Llama", "LlamaForCausalLM")
    with pytest.raises(tdc.PlanError, match="inv_freq"):
        tdc.load(tmp_path / "small.tdc", empty)
