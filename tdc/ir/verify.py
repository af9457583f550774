"""Invariants of the intermediate values; each check raises VerificationError with what is broken."""

from __future__ import annotations

from ..errors import VerificationError
from .block import PRIMITIVES, Block

__all__ = ["verify_block"]


def verify_block(block: Block) -> None:
    """A block is single-assignment, uses only what is defined, and no op has only factors as inputs.

    The last law keeps a constant folder downstream from multiplying the factors back into the dense weight.
    """
    factors = {name for name, _ in block.factors}
    values = {block.input}
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
        if (op.kind == "matmul") != (op.equation is not None):
            raise VerificationError(f"'{op}': matmul, and only matmul, has an equation")
        values.add(op.output)
    if block.output not in values:
        raise VerificationError(f"the output {block.output!r} is never computed")
    used = {name for op in block.ops for name in op.inputs}
    if unused := sorted(factors - used):
        raise VerificationError(f"factors {unused} are never used")
