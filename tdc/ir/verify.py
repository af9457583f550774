"""Invariants of the intermediate values; each check raises VerificationError with what is broken."""

from __future__ import annotations

from ..errors import VerificationError
from .block import PRIMITIVES, Block, Op

__all__ = ["verify_block", "verify_conv"]


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
        if op.kind == "weight":
            if op.rebuild is None or set(op.inputs) != factors or block.execution == "factored":
                raise VerificationError(f"'{op}' builds the weight of a block that is {block.execution}")
            factors |= {op.output}
            continue
        if not any(name in values for name in op.inputs):
            raise VerificationError(f"'{op}' has only constant inputs: a constant folder would undo it")
        if op.output in factors | values:
            raise VerificationError(f"'{op}' assigns {op.output!r} a second time")
        if (op.kind in ("matmul", "contract", "conv")) != (op.equation is not None):
            raise VerificationError(f"'{op}': matmul, contract and conv, and only they, have an equation")
        if op.kind == "conv":
            verify_conv(op, block)
        slides += [window.axis for window in op.windows if not window.trivial]
        values.add(op.output)
    if block.output not in values:
        raise VerificationError(f"the output {block.output!r} is never computed")
    used = {name for op in block.ops for name in op.inputs}
    if len(set(slides)) != len(slides):
        raise VerificationError(f"two steps slide over one window axis: {slides}")
    if unused := sorted({name for name, _ in block.factors} - used):
        raise VerificationError(f"factors {unused} are never used")


def verify_conv(op: Op, block: Block) -> None:
    """A conv's factor lies as convolution operators take it: (groups outputs), inputs, window axes in their order."""
    assert op.equation is not None
    first, *rest = op.equation.inputs[1].groups
    names = [group[0] for group in rest if group[0] in block.kind.windows]
    order = [axis for axis in block.kind.windows if axis in names]
    inputs = rest[: len(rest) - len(names)]
    if first[0] != "g" or len(inputs) > 1 or any(len(group) != 1 for group in rest[len(inputs) :]) or names != order:
        raise VerificationError(f"'{op}': the factor of a convolution is '(g outputs) inputs windows'")
    output = set(op.equation.output.axes)
    channels = [a for a in op.equation.inputs[0].axes if a != "b" and a not in block.kind.windows]
    summed = [axis for group in inputs for axis in group]
    shared = [axis for axis in channels if axis in first]
    if output & set(summed) or channels != [*shared, *summed] or list(first[: len(shared)]) != shared:
        raise VerificationError(f"'{op}': the channels {channels} are not its groups and its inputs {summed}")
    if tuple(window.axis for window in op.windows) != block.kind.windows:
        raise VerificationError(f"'{op}' states the windows {op.windows}, not one for each of {block.kind.windows}")
