"""What a site's weight multiplies, as rows: activations, or the patches of a convolution under its window."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ..ir import Site, Window

__all__ = ["input_rows", "output_rows", "unpadded_rows", "window_lengths"]

_CHUNK = 1 << 24
"""Numbers in the patches that are gathered at a time: 64 MB of float32."""


def input_rows(
    site: Site, activation: Tensor, seed: int, unpadded: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs (rows, g, n) that the weight (g, o, n) of the site meets in this activation, in chunks, and the places
    of those rows among all that it meets.

    Linear sites: all rows of (..., i) but those of padding (:func:`unpadded_rows`). Convolutions: the patches under the
    window, zero padding included, in the order in which ``weight.reshape(g, o, n)`` reads them; of more than
    ``max(4096, 4 n)`` positions in a batch that many are drawn at random, the same ones for the same seed.
    """
    if not site.kind.is_conv:
        rows = activation.reshape(-1, 1, activation.shape[-1])
        real = unpadded_rows(site, activation, unpadded)
        if real is None:
            yield rows, torch.arange(len(rows))
        else:
            yield rows[real.to(rows.device)], real.nonzero().flatten()
        return
    groups, _, width = site.matrix
    batched = activation if activation.ndim == len(site.windows) + 2 else activation[None]
    places, starts = _starts(batched, site.windows, max(4096, 4 * width), seed)
    padded = _padded(batched, site.windows)
    step = max(1, _CHUNK // max(1, groups * width))
    for part, chosen in zip(starts.split(step), places.split(step), strict=True):
        yield _patches(padded, part, site.windows).reshape(len(part), groups, width), chosen


def unpadded_rows(site: Site, values: Tensor, unpadded: Tensor | None) -> Tensor | None:
    """Which rows of what a linear site reads or gives, (examples, positions, n) or (examples * positions, n), are not
    padding, by ``unpadded`` (examples, positions); None where that is not known, or all.
    """
    if unpadded is None or site.kind.is_conv:
        return None
    shape = values.shape[:-1]
    return unpadded.flatten() if shape == unpadded.shape or shape == (unpadded.numel(),) else None


def output_rows(site: Site, outputs: Tensor) -> Tensor:
    """Outputs of the site, or their gradients, as rows (rows, g, o), one for each of its inputs in order."""
    groups, width, _ = site.matrix
    if not site.kind.is_conv:
        return outputs.reshape(-1, 1, width)
    batched = outputs if outputs.ndim == len(site.windows) + 2 else outputs[None]
    return batched.flatten(2).mT.reshape(-1, groups, width)


def window_lengths(site: Site, activation: Tensor) -> tuple[tuple[str, int, int], ...]:
    """(axis, entries of the input, positions of the window) for each window axis."""
    lengths = activation.shape[activation.ndim - len(site.windows) :]
    return tuple((w.axis, length, w.positions(length)) for w, length in zip(site.windows, lengths, strict=True))


def _starts(batched: Tensor, windows: tuple[Window, ...], limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places (rows) among all positions of all examples, and (rows, 1 + axes): example, and the first entry of the
    window along each axis of the padded input.
    """
    counts = [w.positions(length) for w, length in zip(windows, batched.shape[2:], strict=True)]
    sizes = (batched.shape[0], *counts)
    total = int(torch.tensor(sizes).prod())
    if total > limit:
        places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    else:
        places = torch.arange(total)
    index = torch.stack(torch.unravel_index(places, sizes), 1)
    return places, (index * torch.tensor([1, *(w.stride for w in windows)])).to(batched.device)


def _padded(batched: Tensor, windows: tuple[Window, ...]) -> Tensor:
    pads = [w.padding(length) for w, length in zip(windows, batched.shape[2:], strict=True)]
    if not any(before or after for before, after in pads):
        return batched
    return functional.pad(batched, [size for pair in reversed(pads) for size in pair])


def _patches(padded: Tensor, starts: Tensor, windows: tuple[Window, ...]) -> Tensor:
    """(rows, channels, taps...): one gather; taps of an axis lie ``dilation`` apart."""
    axes = len(windows)
    places = []
    for k, window in enumerate(windows):
        offsets = torch.arange(window.size, device=padded.device) * window.dilation
        place = starts[:, k + 1, None] + offsets
        places.append(place.reshape(len(starts), *(window.size if j == k else 1 for j in range(axes))))
    example = starts[:, 0].reshape(-1, *([1] * axes))
    taken = padded.movedim(1, -1)[(example, *places)]
    return taken.movedim(-1, 1)
