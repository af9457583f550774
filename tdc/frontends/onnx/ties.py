"""Constants that hold the same weight: stored once and read often, or stored several times."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from .tensors import array
from .uses import Use

__all__ = ["Root", "difference", "tied"]


@dataclass(eq=False)
class Root:
    """A constant with what reads it."""

    value: ir.Value
    tensor: ir.TensorProtocol
    uses: list[Use] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    hashes: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.value.name or ""

    def digest(self, flipped: bool) -> str:
        """A digest of the entries in canonical order."""
        if self.hashes is None:
            entries = array(self.tensor)
            plain = _digest(entries)
            self.hashes = (plain, _digest(entries.T) if entries.ndim == 2 else plain)
        return self.hashes[flipped]


def _digest(matrix: np.ndarray) -> str:
    digest = hashlib.sha256(f"{matrix.dtype.name} {matrix.shape}".encode())
    step = max(1, (1 << 22) // max(1, prod(matrix.shape[1:])))
    for start in range(0, matrix.shape[0], step):
        digest.update(np.ascontiguousarray(matrix[start : start + step]).tobytes())
    return digest.hexdigest()


def tied(roots: list[Root]) -> Iterator[list[Root]]:
    """Group weights of equal entries, matrices also if stored transposed; a few entries save most of the hashing."""
    buckets: dict[object, list[Root]] = defaultdict(list)
    for root in roots:
        buckets[_few(root)].append(root)
    for bucket in buckets.values():
        if len(bucket) == 1:
            yield bucket
            continue
        groups: dict[frozenset[str], list[Root]] = defaultdict(list)
        for root in bucket:
            groups[frozenset((root.digest(False), root.digest(True)))].append(root)
        yield from groups.values()


def _few(root: Root) -> object:
    """Some entries, type and shape; of a matrix those that a transposition leaves alone."""
    shape = tuple(root.tensor.shape.numpy())
    entries = array(root.tensor)
    entries = entries.diagonal() if len(shape) == 2 else entries.reshape(-1)
    few = entries[:: max(1, len(entries) // 64)].tobytes()
    return root.tensor.dtype, tuple(sorted(shape)) if len(shape) == 2 else shape, few


def difference(group: list[Root], uses: tuple[Use, ...]) -> str:
    """Why the uses of one weight cannot be one site, '' if they can."""
    if len({(use.form.kind, use.form.windows, use.form.groups) for use in uses}) > 1:
        return f"its {len(uses)} convolutions differ in strides, dilations, padding or groups"
    if len({(use.root, use.flipped) for use in uses}) == 1:
        return ""
    roots = {root.value: root for root in group}
    one = len({roots[use.root].digest(use.flipped) for use in uses}) == 1
    return "" if one else "used both as it is and transposed"
