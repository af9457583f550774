"""The module door: finds linear and convolution modules in an ``nn.Module`` and swaps them for factored ones."""

from .factored import Factored, FactoredConv, FactoredLinear
from .program import NnProgram, times

__all__ = ["Factored", "FactoredConv", "FactoredLinear", "NnProgram", "times"]
