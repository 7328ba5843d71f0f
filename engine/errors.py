"""Errors of the engine; the base class and the errors of models are in ``bivec.models.errors``."""

from bivec.models.errors import BivecError, CheckpointError, ConfigError

__all__ = ["BivecError", "CheckpointError", "ConfigError", "DataError", "RunError", "first_line"]


class DataError(BivecError):
    """A training or evaluation file that cannot be used as it is."""


class RunError(BivecError):
    """A run that cannot start or go on: conflicting hyper-parameters, a NaN loss, a full disk."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
