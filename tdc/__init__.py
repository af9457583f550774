"""TDC, a tensor decomposition compiler for neural networks.

A trained model goes in; its weights are replaced by tensor decompositions, chosen and fitted under a budget from the
network and real data; a smaller model of the same kind comes out. Doors: :func:`compress` for modules,
:func:`compress_onnx` for ONNX files, and the command ``tdc``. Rooms: ``ir`` (values), ``decompositions``,
``statistics``, ``planning``, ``frontends``, ``targets``, ``passes``, ``kernels``.
"""

from ._clash import check as _check

_check()

from ._doors import refresh, wait  # noqa: E402
from ._paths import paths  # noqa: E402
from .api import (  # noqa: E402
    calibrate,
    compress,
    compress_export,
    compress_onnx,
    densify,
    heal,
    load,
    pareto,
    plan,
    report,
    save,
)
from .errors import (  # noqa: E402
    BudgetError,
    CalibrationError,
    DestinationError,
    ModelError,
    OptionError,
    PlanError,
    TargetError,
    TdcError,
    VerificationError,
)
from .front import Front  # noqa: E402
from .frontends.nn import FactoredConv, FactoredLinear  # noqa: E402
from .heal import Heal  # noqa: E402
from .ir import Plan  # noqa: E402
from .report import Report  # noqa: E402
from .statistics import Statistics  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CalibrationError",
    "DestinationError",
    "FactoredConv",
    "FactoredLinear",
    "Front",
    "Heal",
    "ModelError",
    "OptionError",
    "Plan",
    "PlanError",
    "Report",
    "Statistics",
    "TargetError",
    "TdcError",
    "VerificationError",
    "calibrate",
    "compress",
    "compress_export",
    "compress_onnx",
    "densify",
    "heal",
    "load",
    "pareto",
    "paths",
    "plan",
    "refresh",
    "report",
    "save",
    "wait",
]
