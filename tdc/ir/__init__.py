"""The intermediate values of the compiler. Standard library only; everything here is immutable."""

from .block import Block, Op
from .equation import Equation, Term
from .layout import Layout, Piece, Rebuild
from .metric import METRICS, Metric
from .path import Path, Step
from .plan import DENSE, Candidate, Cost, Plan
from .remark import Decline, Remark
from .site import OpKind, Site, assign, same_weight

__all__ = [
    "DENSE",
    "METRICS",
    "Block",
    "Candidate",
    "Cost",
    "Decline",
    "Equation",
    "Layout",
    "Metric",
    "Op",
    "OpKind",
    "Path",
    "Piece",
    "Plan",
    "Rebuild",
    "Remark",
    "Site",
    "Step",
    "Term",
    "assign",
    "same_weight",
]
