"""Uses of weights and the sites that they make up.

A use is ``y = x W^T`` in some spelling, or a convolution. The canonical weight W is (o, i) whatever the storage, of a
convolution (g o, i, window axes); the activation has its input axis last (``x``), second to last (``x^T``), or as its
axis 1 (convolutions), and so has the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...ir import Site
from .operators import Form
from .tail import NO_TAIL, Tail, bias, gain, is_void, slot
from .tensors import array, stored, to_torch

__all__ = ["Match", "Use", "canonical"]


@dataclass(frozen=True, eq=False, slots=True)
class Use:
    """One operator that reads the weight ``root``, through ``chain`` (Transpose and Identity nodes).

    ``flipped``: the canonical weight is the transpose of the stored one. ``rank`` of the activation where it matters.
    ``tail``: what stands behind it. ``pad``: a Pad node that the windows of ``form`` include.
    """

    node: ir.Node
    form: Form
    root: ir.Value
    chain: tuple[ir.Node, ...]
    flipped: bool
    rank: int | None
    tail: Tail = NO_TAIL
    pad: ir.Node | None = None

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[self.form.data] if self.pad is None else self.pad.inputs[0]
        assert value is not None
        return value

    @property
    def turned(self) -> bool:
        """Whether the activation has its input axis second to last."""
        return not self.form.kind.is_conv and not self.form.input_last

    def oriented(self, activation: np.ndarray) -> Tensor:
        """As a tensor that has its input axis last (of a convolution: as it is)."""
        tensor = to_torch(activation)
        return tensor.swapaxes(-1, -2) if self.turned else tensor

    @property
    def output(self) -> ir.Value:
        """What a replacement makes: the output of the operator, or of the normalisation behind it."""
        return (self.tail.norm or self.node).outputs[0]

    @property
    def width(self) -> int:
        """Number of outputs, groups counted."""
        tensor = stored(self.root)
        assert tensor is not None
        return int(tensor.shape.numpy()[1 if self.flipped else 0])

    @property
    def inputs(self) -> int:
        """Number of inputs of a product."""
        tensor = stored(self.root)
        assert tensor is not None
        return int(tensor.shape.numpy()[0 if self.flipped else 1])

    @property
    def bias(self) -> np.ndarray | None:
        """The bias in float64, with a normalisation folded in; None if there is none that can be changed."""
        return bias(self.node, self.form, self.tail, self.width)

    @property
    def slot(self) -> tuple[ir.Node, int] | None:
        """Node and input that hold that bias where no normalisation is folded in."""
        return slot(self.node, self.form, self.tail, self.width)

    def weight(self) -> Tensor:
        """The canonical weight, with a normalisation folded in (in float64, rounded to the weight's dtype)."""
        weight, factor = canonical(self.root, self.flipped), gain(self.tail)
        if factor is None:
            return weight
        rows = torch.from_numpy(factor).reshape(-1, *[1] * (weight.ndim - 1))
        return (weight.double() * rows).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Match:
    """A site with all its uses, in node order."""

    site: Site
    uses: tuple[Use, ...]

    @property
    def takes_bias(self) -> bool:
        """Whether the site has no bias, but can have one."""
        use = self.uses[0]
        along = use.form.kind.is_conv or use.form.output_last
        return len(self.uses) == 1 and along and (len(use.node.inputs) < 3 or is_void(use.node))

    def weight(self) -> Tensor:
        """The canonical weight (o, i), of a convolution (g o, i, window axes)."""
        return self.uses[0].weight()


def canonical(root: ir.Value, flipped: bool) -> Tensor:
    """The stored tensor of an initializer or Constant output in canonical axes, contiguous."""
    tensor = stored(root)
    assert tensor is not None
    matrix = to_torch(array(tensor))
    return (matrix.T if flipped else matrix).contiguous()
