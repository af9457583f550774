"""Factors of one weight as initializers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from .tensors import to_numpy

__all__ = ["Store"]

Constant = Callable[[str, np.ndarray, ir.DataType], ir.Value]


class Store:
    """Each factor is stored once per form that is needed. ``constant`` makes a new initializer; ``name`` is the
    weight's, for the names of its factors. The ``shared`` ones are those of ``lead``.
    """

    def __init__(
        self,
        constant: Constant,
        factors: Mapping[str, Tensor],
        name: str,
        lead: Store | None = None,
        shared: frozenset[str] = frozenset(),
    ) -> None:
        self.constant, self.factors, self.name = constant, factors, name
        self.lead, self.shared = lead, shared
        self._known: dict[tuple[object, ...], ir.Value] = {}

    def matrix(self, factor: str, transposed: bool, dtype: ir.DataType) -> ir.Value:
        values = self.factors[factor]
        return self._real(factor, (factor, transposed), values.T if transposed else values, dtype)

    def window(self, factor: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """The factor of a convolution in the shape in which the operator takes it."""
        return self._real(factor, (factor, shape), self.factors[factor].reshape(shape), dtype)

    def _real(self, factor: str, key: tuple[object, ...], values: Tensor, dtype: ir.DataType) -> ir.Value:
        if self.lead is not None and factor in self.shared:
            return self.lead._real(factor, key, values, dtype)
        if key not in self._known:
            self._known[key] = self.constant(f"{self.name}.tdc_{factor}", to_numpy(values, dtype), dtype)
        return self._known[key]

    def index(self, factor: str, start: int, stop: int) -> ir.Value:
        if self.lead is not None and factor in self.shared:
            return self.lead.index(factor, start, stop)
        key = (factor, start, stop)
        if key not in self._known:
            values = self.entries(factor, start, stop)
            suffix = "" if len(values) == len(self.factors[factor]) else f"_{start}"
            self._known[key] = self.constant(f"{self.name}.tdc_{factor}{suffix}", values, ir.DataType.INT32)
        return self._known[key]

    def entries(self, factor: str, start: int, stop: int) -> np.ndarray:
        return to_numpy(self.factors[factor][start:stop], ir.DataType.INT32)

    def scalar(self, what: str, number: float, dtype: ir.DataType) -> ir.Value:
        key = (what, number)
        if key not in self._known:
            values = np.asarray(number, dtype=dtype.numpy())
            self._known[key] = self.constant(f"{self.name}.tdc_{what}", values, dtype)
        return self._known[key]

    def integers(self, what: str, numbers: list[int]) -> ir.Value:
        key = (what, *numbers)
        if key not in self._known:
            values = np.array(numbers, dtype=np.int64)
            self._known[key] = self.constant(f"{self.name}.tdc_{what}", values, ir.DataType.INT64)
        return self._known[key]

    def bias(self, entries: np.ndarray, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """A bias of a replacement, given in float64."""
        return self.constant(f"{self.name}.tdc_bias", entries.reshape(shape).astype(dtype.numpy()), dtype)
