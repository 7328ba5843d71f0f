"""Errors of the engine; the base class and the errors of models are in ``bivec.models.errors``."""

from bivec.models.errors import BivecError, CheckpointError, ConfigError

__all__ = ["BivecError", "CheckpointError", "ConfigError", "DataError", "RunError"]


class DataError(BivecError):
    """A training or evaluation file that cannot be used as it is."""


class RunError(BivecError):
    """A run that cannot start or go on: conflicting hyper-parameters, a NaN loss, a full disk."""
