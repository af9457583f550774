"""Invariants of the intermediate values; each check raises VerificationError with what is broken."""

from __future__ import annotations

from ..errors import VerificationError
from .block import PRIMITIVES, Block, Op

__all__ = ["verify_block"]


def verify_block(block: Block) -> None:
    """A block is single-assignment, uses only what is defined, and no op has only factors as inputs.

    The last law keeps a constant folder downstream from multiplying the factors back into the dense weight.
    """
    factors = {name for name, _ in block.factors}
    values = {block.input}
    slides: list[str] = []
    if factors & values:
        raise VerificationError(f"the factor {block.input!r} has the name of the input")
    for op in block.ops:
        if op.kind not in PRIMITIVES:
            raise VerificationError(f"unknown primitive {op.kind!r} in '{op}'")
        if undefined := [name for name in op.inputs if name not in factors | values]:
            raise VerificationError(f"'{op}' uses {undefined} before it is defined")
        if not any(name in values for name in op.inputs):
            raise VerificationError(f"'{op}' has only constant inputs: a constant folder would undo it")
        if op.output in factors | values:
            raise VerificationError(f"'{op}' assigns {op.output!r} a second time")
        if (op.kind in ("matmul", "conv")) != (op.equation is not None):
            raise VerificationError(f"'{op}': matmul and conv, and only they, have an equation")
        if op.kind == "conv":
            _verify_conv(op, block)
        slides += [window.axis for window in op.windows if not window.trivial]
        values.add(op.output)
    if block.output not in values:
        raise VerificationError(f"the output {block.output!r} is never computed")
    used = {name for op in block.ops for name in op.inputs}
    if len(set(slides)) != len(slides):
        raise VerificationError(f"two steps slide over one window axis: {slides}")
    if unused := sorted(factors - used):
        raise VerificationError(f"factors {unused} are never used")


def _verify_conv(op: Op, block: Block) -> None:
    """A conv's factor lies as convolution operators take it: (groups outputs), inputs, window axes in their order."""
    assert op.equation is not None
    first, *rest = op.equation.inputs[1].groups
    names = [group[0] for group in rest[1:]]
    order = [axis for axis in block.kind.windows if axis in names]
    if len(first) != 2 or first[0] != "g" or any(len(group) != 1 for group in rest) or not rest or names != order:
        raise VerificationError(f"'{op}': the factor of a convolution is '(g outputs) inputs windows'")
    activation = op.equation.inputs[0].axes
    if rest[0][0] not in activation or (rest[0][0] in op.equation.output.axes and first[1] != rest[0][0]):
        raise VerificationError(f"'{op}' does not sum over the inputs {rest[0][0]!r} of its factor")
    if tuple(window.axis for window in op.windows) != block.kind.windows:
        raise VerificationError(f"'{op}' states the windows {op.windows}, not one for each of {block.kind.windows}")
