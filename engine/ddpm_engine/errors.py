"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the input is wrong: the message names it, its value, and what to do.

    Library code raises it like any `ValueError`; the scripts in `launch/` print the message without
    a traceback. Anything else that escapes is a defect of the engine and keeps its traceback.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one readable message and exit status 2."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        # Not `sys.exit`: under a launcher every rank must leave with a non-zero status.
        raise SystemExit(2) from None
