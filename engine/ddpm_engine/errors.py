"""The error that whoever started the program can correct."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input is wrong: the message names it, its value, and what to do.

    Library code raises it like any `ValueError`; a command prints its message without a traceback.
    Anything else that escapes is a defect of the engine and keeps its traceback.

    In the message, fields stand in backticks by their dotted names, as in "`training.steps` is 0;
    it must be at least 1". A command replaces each name that is one of its options by the flag.

    Args:
        message: what is wrong, with which value, and what to do.
        field: dotted name of the field at fault, if it is one field.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFiniteError(UserError):
    """Weights, averages or gradients hold NaN or infinity: the training that led there failed."""
