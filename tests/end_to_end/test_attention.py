"""Torch's own multi-head attention: its projections are sites, and all that can be done to it still can."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn.attention import OpenAttention, close_attention, open_attention, opened
from tdc.frontends.nn.running import evaluation
from tdc.frontends.nn.timing import times

WIDTH, HEADS = 32, 4


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=options.get("batch_first", True)).eval()


def batches(count: int = 6, length: int = 9) -> list[Tensor]:
    return [torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def compressed(model: nn.Module, data: list[Any], **options: Any) -> nn.Module:
    options = {"budget": "params=0.6", "metric": "input", "calibration": data, "progress": False, **options}
    return tdc.compress(model, data[0], **options).eval()


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().sum() / second.square().sum())


@pytest.fixture(params=[True, False], ids=["examples first", "positions first"])
def attention(request: pytest.FixtureRequest) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    made = nn.MultiheadAttention(WIDTH, HEADS, batch_first=request.param)
    nn.init.normal_(made.in_proj_bias)
    nn.init.normal_(made.out_proj.bias)
    return made.eval()


BOOL = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of every head": {"average_attn_weights": False},
    "mask": {"attn_mask": BOOL},
    "mask of numbers": {"attn_mask": torch.randn(7, 7), "need_weights": False},
    "mask of every head": {"attn_mask": BOOL.repeat(5 * HEADS, 1, 1)},
    "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([[7], [6], [3], [1], [7]])},
    "padding and mask": {
        "key_padding_mask": torch.arange(7) >= torch.tensor([[7], [6], [3], [1], [7]]),
        "attn_mask": BOOL,
        "need_weights": False,
    },
    "causal": {"attn_mask": BOOL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": BOOL, "is_causal": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("inputs", ["self", "memory", "three"])
def test_open_attention_gives_the_same(attention: nn.MultiheadAttention, call: str, inputs: str) -> None:
    torch.manual_seed(2)
    shape = (5, 7, WIDTH) if attention.batch_first else (7, 5, WIDTH)
    x, y, z = (torch.randn(shape) for _ in range(3))
    given = {"self": (x, x, x), "memory": (x, y, y), "three": (x, y, z)}[inputs]
    with torch.no_grad():
        wanted, weights = attention(*given, **CALLS[call])
        state = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
        with opened(attention):
            assert type(attention) is OpenAttention
            found, own = attention(*given, **CALLS[call])
    torch.testing.assert_close(found, wanted)
    if weights is None:
        assert own is None
    else:
        torch.testing.assert_close(own, weights)
    assert type(attention) is nn.MultiheadAttention
    assert list(attention.state_dict()) == list(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in attention.state_dict().items())
    assert vars(attention).keys() == vars(nn.MultiheadAttention(WIDTH, HEADS)).keys()


def test_one_example_without_its_axis(attention: nn.MultiheadAttention) -> None:
    x, padding = torch.randn(7, WIDTH), torch.arange(7) > 4
    with torch.no_grad():
        for options in ({}, {"attn_mask": BOOL}, {"key_padding_mask": padding, "average_attn_weights": False}):
            wanted = attention(x, x, x, **options)
            with opened(attention):
                torch.testing.assert_close(attention(x, x, x, **options), wanted)


def test_dropout_and_gradients_go_through(attention: nn.MultiheadAttention) -> None:
    x = torch.randn(5, 7, WIDTH)
    attention.dropout = 0.5
    with opened(attention):
        torch.testing.assert_close(attention(x, x, x), attention(x, x, x))
        attention.train()
        assert relative(attention(x, x, x)[0], attention(x, x, x)[0]) > 0.1
        attention(x, x, x)[0].sum().backward()
    assert attention.in_proj_weight.grad is not None
    with opened(attention), pytest.raises(RuntimeError, match="attn_mask"):
        attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("kind", ["bias_k", "zero", "kdim", "subclass", "forward", "hooked"])
def test_what_is_another_attention_stays_closed(kind: str) -> None:
    class Own(nn.MultiheadAttention):
        pass

    options = {"bias_k": {"add_bias_kv": True}, "zero": {"add_zero_attn": True}, "kdim": {"kdim": 16}}.get(kind, {})
    module = (Own if kind == "subclass" else nn.MultiheadAttention)(WIDTH, HEADS, **options)
    if kind == "forward":
        module.forward = lambda *a, **k: (a[0], None)
    if kind == "hooked":
        module.out_proj.register_forward_hook(lambda *what: None)
    assert not open_attention(module)
    with opened(module):
        assert not isinstance(module, OpenAttention)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}, {"bias": False}])
def test_the_projections_of_an_encoder_are_replaced(options: dict[str, Any]) -> None:
    model, data = encoder(**options), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compressed(model, data, budget="params=0.7")
    names = {choice.site.name for choice in tdc.plan(model, data[0], budget="params=0.7", progress=False).choices}
    assert {"layers.0.self_attn.in_proj.weight", "layers.1.self_attn.out_proj.weight"} <= names
    report = tdc.report(small)
    assert report.replaced >= 6
    assert report.model_after.params < 0.75 * report.model_before.params
    with torch.no_grad():
        assert relative(small(data[0]), model(data[0])) < 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(m, OpenAttention) for m in model.modules())


def test_full_rank_gives_the_same_outputs_with_padding() -> None:
    model, data = encoder(), batches()
    padding = torch.arange(9) >= torch.tensor([[9], [7], [3], [1]])
    small = compressed(model, data, budget="params=1.0", allow="pivoted", metric="weight", calibration=None)
    with torch.no_grad():
        wanted = model(data[0], src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(small(data[0], src_key_padding_mask=padding)[~padding], wanted, rtol=1e-4, atol=1e-4)


def test_a_part_of_an_encoder_with_padding() -> None:
    """The encoder hands nested tensors on where its first layer is dense; the others could not read these."""
    model, data = encoder(3), batches()
    padding = torch.arange(9) >= torch.tensor([[9], [7], [3], [1]])
    for exclude in ("layers.0.*", "*.linear*", "*.self_attn.*"):
        small = compressed(model, data, exclude=exclude)
        with torch.no_grad():
            wanted, found = (net(data[0], src_key_padding_mask=padding)[~padding] for net in (model, small))
        assert relative(found, wanted) < 0.1, exclude


def test_cross_attention_stays_and_its_output_projection_goes() -> None:
    torch.manual_seed(3)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 48, batch_first=True).eval()
    data = [{"src": x, "tgt": y} for x, y in zip(batches(6, 9), batches(6, 5), strict=True)]
    small = compressed(model, data, allow="svd")
    report = tdc.report(small)
    replaced = {row.name for row in report.sites if row.decomposition != "dense"}
    assert "decoder.layers.0.multihead_attn.out_proj.weight" in replaced
    assert "decoder.layers.0.self_attn.in_proj.weight" in {row.name for row in report.sites}
    (told,) = [r for r in report.remarks if r.site == "decoder.layers.0.multihead_attn.in_proj.weight"]
    assert "in a way that no layer does" in told.reason
    with torch.no_grad():
        assert relative(small(**data[0]), model(**data[0])) < 0.1


@pytest.mark.parametrize("exclude", [(), "*.out_proj.weight", "*.in_proj.weight"])
def test_it_is_saved_loaded_copied_and_made_dense_again(exclude: Any, tmp_path: Path) -> None:
    model, data = encoder(), batches()
    small = compressed(model, data, exclude=exclude)
    with torch.no_grad():
        wanted = small(data[0])
        tdc.save(small, tmp_path / "small.tdc")
        loaded = tdc.load(tmp_path / "small.tdc", encoder()).eval()
        assert torch.equal(loaded(data[0]), wanted)
        assert torch.equal(copy.deepcopy(small)(data[0]), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(small))(data[0]), wanted)
        dense = tdc.densify(small)
        torch.testing.assert_close(dense(data[0]), wanted, rtol=1e-4, atol=1e-4)
    assert {name: t.shape for name, t in dense.state_dict().items() if "self_attn" in name} == {
        name: t.shape for name, t in model.state_dict().items() if "self_attn" in name
    }
    assert not any(isinstance(m, OpenAttention) for m in dense.modules())


def test_inplace_changes_the_model_itself() -> None:
    model, data = encoder(), batches()
    assert compressed(model, data, inplace=True) is model
    assert any(isinstance(m, OpenAttention) for m in model.modules())
    with torch.no_grad():
        assert model(data[0]).isfinite().all()


def test_one_plan_serves_other_doors() -> None:
    model, data = encoder(), batches()
    plan = tdc.plan(model, data[0], budget="params=0.6", metric="weight", progress=False)
    assert sum(not choice.is_dense for choice in plan.choices) >= 6
    small = tdc.compress(model, data[0], plan=plan, metric="weight", progress=False).eval()
    with evaluation(model), torch.no_grad():
        program = torch.export.export(model, (data[0],))
    other = tdc.compress_export(program, plan=plan, metric="weight", progress=False).module()
    with torch.no_grad():
        torch.testing.assert_close(other(data[0]), small(data[0]), rtol=1e-3, atol=1e-3)


def test_it_is_healed() -> None:
    model, data = encoder(), batches(8)
    small = compressed(model, data, metric="fisher")
    healed = tdc.heal(copy.deepcopy(small), model, data, config=tdc.Heal(epochs=2, examples=2), progress=False)
    held_out = torch.randn(16, 9, WIDTH, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        wanted = model(held_out)
        assert relative(healed(held_out), wanted) <= relative(small(held_out), wanted)
    assert not any(isinstance(m, OpenAttention) for m in model.modules())


def test_kernels_and_compilers_take_it() -> None:
    model, data = encoder(), batches()
    small = compressed(model, data)
    with torch.no_grad():
        wanted = small(data[0])
        torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(data[0]), wanted)
        remarks = tdc.kernels.accelerate(small, rows=(36,))
        torch.testing.assert_close(small(data[0]), wanted, rtol=1e-4, atol=1e-5)
    assert any("in_proj" in remark.site for remark in remarks)


def test_dense_layers_inside_close_again() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    weight = module.in_proj_weight
    assert open_attention(module)
    assert open_attention(module)
    close_attention(module)
    close_attention(module)
    assert type(module) is nn.MultiheadAttention
    assert module.in_proj_weight is weight
    assert module._qkv_same_embed_dim


def test_the_report_times_the_dense_model_on_its_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = nn.MultiheadAttention.forward

    def watched(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        seen.append("slow")
        return plain(module, *args, **kwargs)

    def forward(layer: nn.TransformerEncoderLayer, *args: Any, **kwargs: Any) -> Any:
        before = len(seen)
        result = whole(layer, *args, **kwargs)
        if len(seen) == before and type(layer.self_attn) is nn.MultiheadAttention:
            seen.append("fused")
        return result

    whole = nn.TransformerEncoderLayer.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", watched)
    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", forward)
    model, data = encoder(), batches()
    small = compressed(model, data)
    seen.clear()
    times(model, small, ((data[0],), {}))
    assert seen
    assert set(seen) == {"fused"}
