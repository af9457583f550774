"""Every error that TDC raises on purpose. All derive from :class:`TdcError`, so one ``except`` catches them."""

from __future__ import annotations


class TdcError(Exception):
    """Base of TDC's errors. ``exit_code`` is what the ``tdc`` command returns for it."""

    exit_code = 2


class OptionError(TdcError, ValueError):
    """An option has a wrong name, type or value. The message says what to write instead."""


class BudgetError(OptionError):
    """A budget that cannot be read or reached. For an unreachable one the message gives the nearest reachable."""


class ModelError(TdcError, ValueError):
    """A model (file) that cannot be read, or on which no plan can be made."""


class CalibrationError(TdcError, ValueError):
    """Calibration data that is empty or does not fit the model, or statistics that do not fit the sites."""


class PlanError(TdcError, ValueError):
    """A plan that cannot be read, or that does not fit the model. The message names the site."""


class TargetError(OptionError):
    """A target's description, or a table of times, that cannot be read or does not fit this machine. The message names
    the file and the key.
    """


class VerificationError(TdcError, RuntimeError):
    """A result that failed its own check (a broken invariant of a pass, a model that the runtime refuses)."""

    exit_code = 5


class DestinationError(TdcError, OSError):
    """An output that cannot or must not be written. Nothing has been left behind."""

    exit_code = 6
