"""``tdc.compress`` on modules: what users rely on, from exactness to ``generate`` and ``save_pretrained``."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tdc
from tdc import decompositions
from tdc.frontends.nn import NnProgram
from tdc.ir import Candidate, Plan
from tdc.testing import applicable, assert_close, random_mlp, random_weight, variants_of

NAMES = applicable({"o": 12, "i": 8}, by_default=True)
CASES = [(name, variant) for name in NAMES for variant in variants_of(name, {"o": 12, "i": 8})]
BUDGET = "params=0.6"


class Own(nn.Linear):
    """A subclass that keeps the forward of nn.Linear."""


def conv1d(weight: Tensor) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(weight.shape[0], weight.shape[1])
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(torch.linspace(-1, 1, weight.shape[0]))
    return layer


def linear(weight: Tensor, kind: type[nn.Linear] = nn.Linear, bias: bool = True) -> nn.Module:
    layer = kind(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


SPELLINGS: dict[str, Callable[[Tensor], nn.Module]] = {
    "linear": linear,
    "no-bias": lambda weight: linear(weight, bias=False),
    "subclass": lambda weight: linear(weight, Own),
    "conv1d": conv1d,
}


def full_rank_plan(model: nn.Module, x: Tensor, name: str, variant: str) -> Plan:
    """Every site at the rank at which the decomposition is exact."""
    d = decompositions.get(name)
    sites, _ = NnProgram(model, x).sites()
    return Plan(tuple(Candidate(s, name, variant, tuple(d.full_ranks(s.axes, variant).items())) for s in sites))


def tiny(name: str = "svd", **options: Any) -> nn.Sequential:
    return tdc.compress(
        random_mlp(), torch.zeros(4, 24), **{"budget": BUDGET, "allow": name, "progress": False, **options}
    )


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_full_rank_is_exact_in_every_spelling(
    name: str, variant: str, spelling: str, dtype: torch.dtype, tolerance: float
) -> None:
    for shape in ((12, 8), (7, 13)):
        model = nn.Sequential(SPELLINGS[spelling](random_weight(*shape))).to(dtype)
        x = random_weight(6, shape[1], seed=3).to(dtype)
        small = tdc.compress(model, x, plan=full_rank_plan(model, x, name, variant), progress=False)
        assert isinstance(small[0], tdc.FactoredLinear)
        assert_close(small(x), model(x), tolerance)
        assert_close(small[0].weight, model[0].weight, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_error_falls_with_the_budget(name: str) -> None:
    model, x = random_mlp(dtype=torch.float64), random_weight(64, 24, seed=3)
    errors: list[float] = []
    for keep in (0.2, 0.4, 0.6, 0.8):
        small = tdc.compress(model, x, budget=f"params={keep}", allow=name, allocation="uniform", progress=False)
        errors.append((small(x) - model(x)).norm().item())
        assert tdc.report(small).after.params <= keep * tdc.report(small).before.params
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] > 0


def test_the_input_metric_serves_the_data_better_than_the_weight_metric() -> None:
    """One layer: the metric is the mean squared error of its output on the data, so nothing can beat it there."""
    model = nn.Sequential(linear(random_weight(16, 24))).double()
    x = torch.randn(24000, 24, dtype=torch.float64) * torch.logspace(0, -3, 24, dtype=torch.float64)
    made = {
        m: tdc.compress(model, x, budget=BUDGET, metric=m, calibration=[x], progress=False) for m in ("weight", "input")
    }
    lost = {metric: (small(x) - model(x)).square().mean().item() for metric, small in made.items()}
    assert lost["input"] < lost["weight"]
    (site,) = tdc.report(made["input"]).sites
    second = (model(x) - model[0].bias).square().mean().item()
    assert lost["input"] / second == pytest.approx(site.error, rel=1e-3)  # with 1000 rows per input


def test_the_class_stays_and_the_original_is_untouched() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.note = random_mlp(), "mine"

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Net().train()
    model.body[1].eval()
    state = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    small = tdc.compress(model, torch.zeros(4, 24), budget=BUDGET, calibration=[torch.randn(64, 24)], progress=False)
    assert type(small) is Net
    assert small.note == "mine"
    assert [m.training for m in model.modules()] == [m.training for m in small.modules()] == flags
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not set(map(id, model.parameters())) & set(map(id, small.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_every_factor_and_bias(name: str) -> None:
    small = tiny(name)
    small(torch.randn(4, 24)).square().sum().backward()
    names = dict(small.named_parameters())
    assert {"0.bias", "2.bias"} < set(names)
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in names.values())
    before = small(torch.ones(1, 24)).sum().item()
    torch.optim.SGD(small.parameters(), 0.1).step()
    assert small(torch.ones(1, 24)).sum().item() != before


def test_hooks_of_a_replaced_module_keep_firing() -> None:
    model, calls = random_mlp(), []
    model[0].register_forward_hook(lambda m, args, y: calls.append((type(m).__name__, y.shape)))
    model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
    small = tdc.compress(model, torch.zeros(4, 24), budget=BUDGET, progress=False)
    calls.clear()
    small(torch.zeros(4, 24))
    assert calls == ["pre", ("FactoredLinear", (4, 40))]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_deepcopy_and_pickle_keep_every_bit(name: str) -> None:
    small, x = tiny(name), torch.randn(4, 24)
    expected = small(x)
    other = tiny(name)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(small.state_dict())
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    copies = [other, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(buffer, weights_only=False)]
    assert all(torch.equal(twin(x), expected) for twin in copies)
    assert str(tdc.report(copies[2])) == str(tdc.report(small))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_can_be_changed_afterwards_or_before(name: str, dtype: torch.dtype) -> None:
    after = tiny(name).to(dtype)
    model = random_mlp().to(dtype)
    before = tdc.compress(model, torch.zeros(4, 24, dtype=dtype), budget=BUDGET, allow=name, progress=False)
    for small in (after, before):
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert small(torch.zeros(4, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_batch_shape_is_a_batch_of_rows(name: str, variant: str) -> None:
    model, x = nn.Sequential(linear(random_weight(12, 8))).double(), random_weight(30, 8, seed=2)
    small = tdc.compress(model, x, plan=full_rank_plan(model, x, name, variant), progress=False)
    for shape in ((8,), (30, 8), (2, 15, 8), (2, 3, 5, 8), (0, 8)):
        y = x[: max(1, x.numel() // 8)].flatten()[: torch.Size(shape).numel()].reshape(shape)
        assert small(y).shape == (*shape[:-1], 12)
        assert_close(small(y), model(y), 1e-12)


def test_inplace_changes_the_model_itself_and_nothing_else_does() -> None:
    model = random_mlp()
    first = model[0]
    assert tdc.compress(model, torch.zeros(4, 24), budget=BUDGET, inplace=True, progress=False) is model
    assert isinstance(model[0], tdc.FactoredLinear)
    assert type(first) is nn.Linear
    assert torch.equal(first.weight, random_mlp()[0].weight)


@pytest.mark.parametrize("exclude", ["0", "0.weight", "0*", ["[01].weight"]])
def test_excluded_sites_stay_dense_with_a_remark(exclude: str | list[str]) -> None:
    small = tiny(exclude=exclude)
    assert [type(small[k]) for k in (0, 2)] == [nn.Linear, tdc.FactoredLinear]
    assert [r.site for r in tdc.report(small).remarks if "excluded by" in r.reason] == ["0.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_only_allowed_decompositions_are_used(name: str) -> None:
    assert {site.decomposition for site in tdc.report(tiny(name)).sites} <= {name, "dense"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_densify_gives_the_replaced_classes_and_the_same_function(name: str, spelling: str) -> None:
    layers = [SPELLINGS[spelling](random_weight(*shape)) for shape in ((20, 12), (16, 20))]
    model, x = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double(), random_weight(9, 12, seed=4)
    small = tdc.compress(model, x, budget=BUDGET, allow=name, progress=False)
    dense = tdc.densify(small)
    assert [type(m) for m in dense] == [type(m) for m in model]
    assert not any(isinstance(m, tdc.FactoredLinear) for m in dense.modules())
    assert_close(dense(x), small(x), 1e-12)
    assert {k: t.shape for k, t in dense.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert any(isinstance(m, tdc.FactoredLinear) for m in small.modules())


@pytest.mark.parametrize(
    "budget", ["params=0.1", "params=0.3", "bytes=0.5", "macs=0.7", "params=1", "params=0.9,bytes=0.8"]
)
def test_the_report_counts_what_is_stored_and_it_is_never_more_than_dense(budget: str) -> None:
    model = random_mlp((24, 40, 16, 8))
    small = tdc.compress(model, torch.zeros(4, 24), budget=budget, progress=False)
    report, state = tdc.report(small), small.state_dict()
    real = [t for t in state.values() if t.is_floating_point()]
    assert report.model_after.params == sum(t.numel() for t in real)
    assert report.model_after.bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert report.model_before.params == sum(p.numel() for p in model.parameters())
    assert report.model_after.params <= report.model_before.params
    assert report.model_after.bytes <= report.model_before.bytes
    for site in report.sites:
        module = site.name.removesuffix(".weight")
        stored = [t for key, t in state.items() if key.startswith(f"{module}.weight")]
        assert site.after.params == sum(t.numel() for t in stored if t.is_floating_point())
        assert site.after.bytes == sum(t.numel() * t.element_size() for t in stored)
    saved = report.before.params - report.after.params
    assert report.model_before.params - report.model_after.params == saved


def test_a_plan_file_that_was_edited_by_hand_is_applied(tmp_path: Path) -> None:
    x = torch.zeros(4, 24)
    plan = tdc.plan(random_mlp(), x, budget=BUDGET, allow="svd", progress=False)
    data = json.loads(plan.to_json())
    data["sites"][0]["ranks"]["r"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(data))
    small = tdc.compress(random_mlp(), x, plan=tmp_path / "plan.json", progress=False)
    assert small[0].weight_v.shape == (2, 24)
    assert tdc.report(small).sites[0].after.params == 2 * (24 + 40)
    assert tdc.report(small).sites[0].error == pytest.approx(
        sum(k**-2 for k in range(3, 25)) / sum(k**-2 for k in range(1, 25)), rel=1e-5
    )


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = random_mlp(), random_mlp(seed=5)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"out": self.a(x) + scale * self.b(y)}


def test_tuples_dicts_and_tensors_are_example_inputs() -> None:
    x, y = torch.randn(2, 4, 24)
    texts = [
        tdc.plan(Two(), e, budget=BUDGET, progress=False).to_json() for e in ((x, y), {"x": x, "y": y}, [x, y, 2.0])
    ]
    assert texts[0] == texts[1] == texts[2]


def test_positional_and_keyword_batches_give_the_same_statistics() -> None:
    pairs = [torch.randn(2, 32, 24) for _ in range(2)]
    given = [[(x, y) for x, y in pairs], [{"x": x, "y": y} for x, y in pairs], ({"y": y, "x": x} for x, y in pairs)]
    digests = {tdc.calibrate(Two(), batches, progress=False).digest for batches in given}
    assert len(digests) == 1


def test_a_data_loader_with_labels_calibrates_like_its_inputs() -> None:
    x, labels = torch.randn(64, 24), torch.zeros(64, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, labels), batch_size=32)
    known = tdc.calibrate(random_mlp(), loader, progress=False)
    assert known.digest == tdc.calibrate(random_mlp(), [x[:32], x[32:]], progress=False).digest
    assert known.batches == 2
    small = tdc.compress(random_mlp(), budget=BUDGET, calibration=loader, progress=False)
    assert tdc.report(small).metric == "fisher"


def test_labels_are_not_taken_for_an_optional_argument() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = random_mlp()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.body(x if mask is None else x * mask)

    x = torch.randn(64, 24)
    labelled = tdc.plan(Masked(), x[:1], budget=BUDGET, calibration=[(x, torch.zeros(64, 24))], progress=False)
    assert labelled == tdc.plan(Masked(), x[:1], budget=BUDGET, calibration=[x], progress=False)


def causal(name: str) -> Any:
    """A tiny untrained language model; GPT-2's layers are Conv1D and its head is tied to the embedding."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **sizes)
        return transformers.GPT2LMHeadModel(config).eval()
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **more, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.mark.parametrize("metric", ["weight", "input"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_generates_and_survives_save_pretrained(tmp_path: Path, name: str, metric: str) -> None:
    model = causal(name)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    data = [batch] if metric == "input" else None
    small = tdc.compress(model, batch, budget=BUDGET, calibration=data, metric=metric, progress=False)
    assert type(small) is type(model)
    assert tdc.report(small).replaced >= 4
    made = small.generate(**batch, max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 10)
    small.save_pretrained(tmp_path / "folder")
    again = tdc.load(
        tmp_path / "folder", type(model)(type(model).config_class.from_pretrained(tmp_path / "folder")).eval()
    )
    assert torch.equal(again(**batch).logits, small(**batch).logits)
    assert torch.equal(again.generate(**batch, max_new_tokens=4, do_sample=False), made)
    assert str(tdc.report(again)) == str(tdc.report(small))


def test_the_head_of_gpt2_stays_with_its_embedding() -> None:
    small = tdc.compress(causal("gpt2"), {"input_ids": IDS}, budget=BUDGET, progress=False)
    assert small.lm_head.weight is small.transformer.wte.weight
    (reason,) = [r.reason for r in tdc.report(small).remarks if r.site == "transformer.wte.weight"]
    assert "tied to" in reason
    assert "Embedding" in reason


def test_the_config_of_a_language_model_is_noted_in_the_result_alone() -> None:
    model = causal("llama")
    small = tdc.compress(model, {"input_ids": IDS}, budget=BUDGET, progress=False)
    noted = [hasattr(m.config, "tdc") for m in (model, small, tdc.densify(small))]
    assert noted == [False, True, False]
