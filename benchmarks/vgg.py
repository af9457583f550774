"""VGG11 for CIFAR-10 and its data, as benchmarks use them; from ../shared/data."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from common import shared_data
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["VGG11", "accuracy", "cifar", "hits", "load_vgg11", "mcnemar"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PLAN = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


class VGG11(nn.Module):
    """VGG11 with BatchNorm for 32 x 32 images and 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in PLAN:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def load_vgg11() -> VGG11:
    """The trained model, in evaluation mode."""
    model = VGG11()
    model.load_state_dict(load_file(shared_data("vgg11_cifar10.safetensors")))
    return model.eval()


def cifar(part: str, count: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) normalised as in training, and labels (n), of ``train`` or ``dev``."""
    from PIL import Image

    data = np.load(shared_data(f"cifar10_{part}.npz"))
    stop = len(data["label"]) if count is None else start + count
    blob, offsets = data["jpeg"], data["offset"]  # each look-up in an .npz file reads the array anew
    places = zip(offsets[start:stop], offsets[start + 1 : stop + 1], strict=True)
    images = [np.asarray(Image.open(io.BytesIO(blob[first:last].tobytes()))) for first, last in places]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (x - mean) / std, torch.from_numpy(data["label"][start:stop].astype(np.int64))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that are classified right."""
    return 100 * float(hits(model, images, labels).float().mean())


def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified right."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels


def mcnemar(first: Tensor, second: Tensor) -> float:
    """How likely a difference of at least that size is among images that one of two models has right and the other not,
    were they equally good: the exact two-sided test of McNemar (1947).
    """
    only, other = int((first & ~second).sum()), int((second & ~first).sum())
    ways = sum(math.comb(only + other, k) for k in range(min(only, other) + 1))
    return min(1.0, 2 * ways / 2 ** (only + other))
