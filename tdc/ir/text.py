"""Text forms: the tables that plans and reports print. Golden files in the tests hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Candidate, Plan

__all__ = ["format_count", "format_table", "plan_explanation", "plan_table"]


def format_count(number: float) -> str:
    """``1234567 -> '1.23 M'``: three significant figures with a decimal prefix."""
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {prefix}"
    return f"{number:.3g}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Plain text columns under a ruled header; the first ``left`` columns to the left, the others to the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def plan_table(plan: Plan) -> str:
    """What is decided per site and in all, and the remarks."""
    rows = []
    for choice in plan.choices:
        ranks = " ".join(f"{axis}={rank}" for axis, rank in (*choice.kept.items(), *choice.ranks))
        keep = choice.cost.params / choice.dense_cost.params if choice.dense_cost.params else 1.0
        name = f"{choice.decomposition}/{choice.variant}" if choice.variant else choice.decomposition
        name += f" ({choice.execution})" if choice.execution != "factored" else ""
        name += f" (joint {choice.joint.group})" if choice.joint else ""
        rows.append(
            (
                choice.site.name,
                choice.site.label,
                name,
                ranks or "-",
                f"{keep:.3f}",
                f"{choice.error:.2e}",
                f"{choice.sensitivity:.2e}",
            )
        )
    header = ("site", "layer", "decomposition", "ranks", "keep", "error", "sensitivity")
    before, after = plan.dense_cost, plan.cost
    replaced = sum(not choice.is_dense for choice in plan.choices)
    made = f"metric {plan.metric}" + (f" (statistics {plan.statistics[:12]})" if plan.statistics else "")
    lines = [
        f"plan for {plan.budget or 'no budget'}, {made}, target {plan.target}, {plan.allocation} allocation",
        "",
        format_table(header, rows, left=3),
        "",
        f"{replaced} of {len(plan.choices)} candidate sites replaced; of their dense cost stays:",
    ]
    for quantity in ("params", "bytes", "macs"):
        old, new = getattr(before, quantity), getattr(after, quantity)
        share = new / old if old else 1.0
        lines.append(f"  {quantity:<7}{format_count(old):>9} -> {format_count(new):>9}   keep {share:.4f}")
    if before.seconds:
        old, new = (f"{1e3 * cost.seconds:.3g} ms" for cost in (before, after))
        lines.append(f"  time   {old:>9} -> {new:>9}   keep {after.seconds / before.seconds:.4f}  (measured layers)")
    lines.append(f"  predicted loss {plan.loss:.4g}" + (f", at least {plan.bound:.4g}" if plan.bound else ""))
    lines.extend(str(remark) for remark in plan.remarks)
    return "\n".join(lines)


def plan_explanation(plan: Plan, choices: Sequence[Candidate]) -> str:
    """What was considered for each of the choices of a plan, and what decided."""
    prices = ", ".join(f"{value:.3g} for one more of {key}" for key, value in plan.price)
    lines = [str(remark) for remark in plan.remarks if remark.stage == "choose-plan" and not remark.site]
    if prices:
        lines += [f"price, what the budget saves of loss elsewhere: {prices}"]
        lines += ["the least loss + price wins, but for what the budget leaves over"]
        if any(r.group for choice in choices for r in choice.rivals):
            lines += ["of a group: its whole loss + price less the best of the other sites by themselves"]
    for choice in choices:
        lines += ["", f"{choice.site.name}, {choice.site.label}, {choice.sensitivity:.3g} of loss per unit of error"]
        ranks = (*choice.kept.items(), *choice.ranks)
        wanted = choice.group, choice.decomposition, ranks
        own = [r for r in choice.rivals if (r.group, r.decomposition, r.ranks) == wanted]
        won = next((r for r in own if r.variant == choice.variant), own[0] if own else None)  # folding may turn it
        rows = [
            (
                ("* " if r is won else "  ")
                + (f"{r.decomposition}/{r.variant}" if r.variant else r.decomposition)
                + (f" (group {r.group})" if r.group else ""),
                " ".join(f"{axis}={rank}" for axis, rank in r.ranks) or "-",
                f"{r.params / max(1, choice.dense_cost.params):.3f}",
                f"{r.error:.2e}",
                f"{r.loss:.2e}",
                f"{r.priced:.2e}",
            )
            for r in choice.rivals
        ]
        lines.append(format_table(("considered", "ranks", "keep", "error", "loss", "loss + price"), rows, left=2))
        lines += [str(remark) for remark in plan.remarks if remark.site in choice.site.names]
    return "\n".join(lines).lstrip("\n")
