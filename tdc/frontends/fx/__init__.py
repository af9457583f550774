"""The compiler door: finds weights in ATen graphs (of Dynamo, of ``torch.export``) and puts blocks in their place."""

from .captured import Bound, Captured
from .program import FxProgram
from .rewrite import Rewritten

__all__ = ["Bound", "Captured", "FxProgram", "Rewritten"]
