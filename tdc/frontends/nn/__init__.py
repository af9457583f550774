"""The module door: finds linear and convolution modules in an ``nn.Module`` and swaps them for factored ones."""

from .batches import as_call
from .factored import Factored, FactoredConv, FactoredLinear
from .program import NnProgram
from .timing import times

__all__ = ["Factored", "FactoredConv", "FactoredLinear", "NnProgram", "as_call", "times"]
