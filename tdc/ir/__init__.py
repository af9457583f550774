"""The intermediate values of the compiler. Standard library only; everything here is immutable."""

from .block import Block, Op, contraction, conv_groups, conv_shape
from .equation import Equation, Term
from .layout import Layout, Piece, Pivot, Rebuild
from .metric import METRICS, Metric
from .path import Path, Step
from .plan import DENSE, EXECUTIONS, Candidate, Cost, Hidden, Joint, Plan, Rival
from .remark import Decline, Remark
from .site import CONVOLUTIONS, OpKind, Site, assign, same_weight, window_attributes
from .window import Window

__all__ = [
    "CONVOLUTIONS",
    "DENSE",
    "EXECUTIONS",
    "METRICS",
    "Block",
    "Candidate",
    "Cost",
    "Decline",
    "Equation",
    "Hidden",
    "Joint",
    "Layout",
    "Metric",
    "Op",
    "OpKind",
    "Path",
    "Piece",
    "Pivot",
    "Plan",
    "Rebuild",
    "Remark",
    "Rival",
    "Site",
    "Step",
    "Term",
    "Window",
    "assign",
    "contraction",
    "conv_groups",
    "conv_shape",
    "same_weight",
    "window_attributes",
]
