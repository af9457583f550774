"""``torch.compile(model, backend="tdc")`` on architectures of many makes: at full rank equal to eager."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
IDS = torch.arange(3, 17).reshape(2, 7)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
DIMS = {"d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}


def made(name: str, kind: str, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**more)).eval()


def check(model: nn.Module, least: int, call: Callable[[nn.Module], Any], full: dict[str, Any]) -> None:
    compiled = torch.compile(model, backend=tdc_backend, options=full)
    with torch.no_grad():
        expected, found = call(model), call(compiled)
        try:
            exact = call(copy.deepcopy(model).double())
        except RuntimeError:  # torch multiplies groups of matrices in single precision only (Mixtral)
            exact = None
    same(expected, found, exact)
    assert tdc.report(compiled).replaced >= least


def same(expected: Any, found: Any, exact: Any) -> None:
    """Dynamo's own measure: no farther from float64 than eager is, times a small factor."""
    from torch._dynamo.utils import same as is_same

    assert isinstance(expected, Tensor)
    assert is_same(expected, found, fp64_ref=exact, tol=1e-4)


def by_ids(model: Any) -> Tensor:
    return model(input_ids=IDS).logits if hasattr(model, "lm_head") else model(input_ids=IDS).last_hidden_state


def pixels(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin().to(dtype)
    return model(pixel_values=x).last_hidden_state


def t5(model: Any) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def whisper(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    mel = torch.linspace(-1, 1, 2 * 8 * 40).reshape(2, 8, 40).sin().to(dtype)
    return model(input_features=mel, decoder_input_ids=IDS).last_hidden_state


def clip(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin().to(dtype)
    return model(input_ids=IDS, pixel_values=x).logits_per_image


def llama(name: str, **more: Any) -> nn.Module:
    return made(
        name, f"{name}ForCausalLM", **SMALL, intermediate_size=48, num_key_value_heads=2, use_cache=False, **more
    )


TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, Callable[[Any], Tensor]]] = {
    "resnet": (
        lambda: made(
            "ResNet", "ResNetModel", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
        ),
        8,
        pixels,
    ),
    "bert": (lambda: made("Bert", "BertModel", **SMALL, intermediate_size=48), 13, by_ids),
    "gpt2": (
        lambda: made("GPT2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64, use_cache=False),
        8,
        by_ids,
    ),
    "llama": (lambda: llama("Llama"), 15, by_ids),
    "t5": (lambda: made("T5", "T5ForConditionalGeneration", **DIMS, d_kv=8, d_ff=48, use_cache=False), 32, t5),
    "whisper": (
        lambda: made(
            "Whisper",
            "WhisperModel",
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=64,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        ),
        34,
        whisper,
    ),
    "vit": (lambda: made("ViT", "ViTModel", **TOWER, image_size=32, patch_size=8), 14, pixels),
    "mixtral": (lambda: llama("Mixtral", num_local_experts=2), 9, by_ids),
    "mamba": (
        lambda: made("Mamba", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, vocab_size=64, use_cache=False),
        6,  # and in newer PyTorch two more
        by_ids,
    ),
    "clip": (
        lambda: made(
            "CLIP",
            "CLIPModel",
            text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 16},
            vision_config={**TOWER, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        ),
        27,
        clip,
    ),
    "deberta": (lambda: made("Deberta", "DebertaModel", **SMALL, intermediate_size=48), 8, by_ids),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_at_full_rank_is_equal_to_eager(name: str, full: dict[str, Any]) -> None:
    make, least, call = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(make(), least, call, full)
