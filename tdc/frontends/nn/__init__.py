"""The module door: finds linear modules in an ``nn.Module`` and swaps them for factored ones."""

from .factored import FactoredLinear
from .program import NnProgram

__all__ = ["FactoredLinear", "NnProgram"]
