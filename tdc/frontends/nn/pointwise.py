"""Pivoted pointwise factors as whole matrices, where a gather of the activation would cost more.

With the channels last, a gather moves single numbers: in VGG11 at a tenth of its parameters, 16 images, one thread, it
takes away a third of the speed. Rebuilding the factor at every call moves o r numbers instead of o for every position,
and stays right when the factor is trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...ir import Op

__all__ = ["COLUMNS", "ROWS", "whole_columns", "whole_rows", "without_gathers"]

ROWS, COLUMNS = "whole rows", "whole columns"
"""Kinds of ops (activation, coefficients, index) that stand for products and gathers of one pivoted factor: of one
whose rows, or columns, hold the identity.
"""


def without_gathers(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The same line with every pivoted factor applied by one op: its takes, product and concat or add in one."""
    found = list(ops)
    for op in ops:
        joined = next((o for o in found if o.kind in ("concat", "add") and op.output == o.inputs[1]), None)
        if op.kind != "conv" or joined is None:
            continue
        if joined.kind == "concat":
            last = next(o for o in found if o.kind == "take" and o.inputs[0] == joined.output)
            source, gone = op.inputs[0], [op, joined]
        else:
            takes = [o for o in found if o.kind == "take" and o.output in (*joined.inputs, op.inputs[0])]
            if len(takes) != 2:
                continue
            last, source, gone = joined, takes[0].inputs[0], [*takes, op]
        index = next(o.inputs[1] for o in (*gone, last) if o.kind == "take")
        kind = ROWS if joined.kind == "concat" else COLUMNS
        whole = replace(op, kind=kind, output=last.output, inputs=(source, op.inputs[1], index))
        found = [whole if o is last else o for o in found if o not in gone]
    return tuple(found)


def whole_rows(coef: Tensor, place: Tensor) -> Tensor:
    """(o, r) from coefficients (o - r, r) and the place of each row in the stack of identity and coefficients."""
    eye = torch.eye(coef.shape[1], dtype=coef.dtype, device=coef.device)
    return torch.cat([eye, coef]).index_select(0, place)


def whole_columns(coef: Tensor, order: Tensor) -> Tensor:
    """(r, i) from coefficients (r, i - r) and the order in which the stack holds the columns."""
    stack = torch.cat([torch.eye(coef.shape[0], dtype=coef.dtype, device=coef.device), coef], 1)
    return torch.zeros_like(stack).index_copy(1, order.long(), stack)
