"""In which order the factors of a plan meet the activation, step by step, with what each step takes."""

from __future__ import annotations

import math
from pathlib import Path

from . import targets
from .errors import PlanError
from .ir import Block, Candidate, Op, Plan
from .ir.machine import Work
from .ir.text import format_count, format_table
from .passes._clock import call_for, clock_of
from .passes._seconds import dense_seconds
from .passes.propose_layouts import lowered
from .planning.cost import ITEMSIZE
from .planning.seconds import Clock, Estimate, amount
from .planning.works import Call, works_of
from .targets import Target

__all__ = ["paths"]


def paths(plan: Plan | str | Path, *, target: str = "auto") -> str:
    """The contraction order of every replaced site of a plan, sites that are alike once, as a text.

    Each step is an equation of the activation and one factor, with the sizes of its axes, multiply-adds, bytes moved
    and seconds in one call; ``measured``, ``interpolated`` and ``modelled`` say where the seconds come from.

    Args:
        plan: what :func:`plan` returned, or the path of a plan file.
        target: the machine, see ``tdc target list``; ``auto`` is the one of the plan.

    Raises:
        OptionError: an unknown target.
        PlanError: a plan that cannot be read, or ranks that its sites cannot have.
    """
    made = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    machine = targets.get(made.target if target == "auto" else target)
    found: dict[object, list[Candidate]] = {}
    for choice in made.choices:
        if not choice.is_dense:
            found.setdefault(_alike(choice), []).append(choice)
    texts = [_text(machine, choices) for choices in found.values()]
    return "\n\n".join(texts) if texts else "the plan replaces no site"


def _alike(choice: Candidate) -> object:
    site = choice.site
    layer = (site.kind, site.sizes, site.attributes, site.dtype, site.uses, call_for(choice))
    sizes = (*choice.kept.items(), *choice.ranks)
    return layer, choice.decomposition, choice.variant, sizes, choice.execution, choice.folded


def _text(target: Target, choices: list[Candidate]) -> str:
    choice = choices[0]
    try:
        layout, block = lowered(target, choice)
    except ValueError as error:
        raise PlanError(f"{choice.site.name}: {error}") from error
    others = f" and {len(choices) - 1} more" if len(choices) > 1 else ""
    ranks = " ".join(f"{axis}={rank}" for axis, rank in (*choice.kept.items(), *choice.ranks))
    name = f"{choice.decomposition}{'/' * bool(choice.variant)}{choice.variant}"
    head = f"{choice.site.name}{others}, {choice.site.label}: {name} {ranks}, {choice.execution}"
    lines = [head, f"  {layout.rebuild}"]
    if not isinstance(block, Block):
        return "\n".join([*lines, f"  {target.name} cannot run it: {block.reason}"])
    clock, call = clock_of(target), call_for(choice)
    unit = "position" if choice.site.kind.is_conv else "row"
    where = f"{call.rows:.6g} {unit}{'s' * (call.rows != 1)}"
    rows = [_row(block, op, works, clock, call) for op, works in works_of(block, call)]
    header = ("step", "sizes", "multiply-adds", "bytes", "seconds")
    lines += [f"  a call of {where}:", *("  " + line for line in format_table(header, rows, left=2).splitlines())]
    if clock is not None:
        total = clock.block(block, call).times(choice.site.uses)
        dense = dense_seconds(clock, choice)
        share = total.seconds / dense.seconds
        lines.append(f"  all uses: {_seconds(total)}, dense {_seconds(dense)}, {share:.2f} of it")
    return "\n".join(lines)


def _row(block: Block, op: Op, works: tuple[Work, ...], clock: Clock | None, call: Call) -> tuple[str, ...]:
    size, macs, moved = ITEMSIZE.get(call.dtype, 4), 0.0, 0.0
    for work in works:
        own = amount(work)
        macs += math.prod(own.product) if own.product else 0.0
        moved += (own.weights + own.activations) * size
    seconds = "-" if clock is None else _seconds(sum(map(clock.work, works), Estimate(0.0)))
    return str(op), _sizes(block, op), format_count(macs), format_count(moved), seconds


def _sizes(block: Block, op: Op) -> str:
    """Of the axes of a step, a factor without its identity block with what it stores."""
    if op.equation is None:
        return "-"
    known = dict(block.sizes)
    shape = dict(block.factors).get(op.inputs[1], ())
    for group, length in zip(op.equation.inputs[1].groups, shape, strict=False):
        if len(group) == 1:
            known[group[0]] = length
    named = (axis for axis in op.equation.axes if axis in known)
    return " ".join(f"{axis}={known[axis]}" for axis in named)


def _seconds(estimate: Estimate) -> str:
    return f"{1e6 * estimate.seconds:.3g} us {estimate.label}"
