"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the input is wrong: the message names it, its value, and what to do.

    Library code raises it like any `ValueError`; the scripts in `launch/` print the message without
    a traceback. Anything else that escapes is a defect of the engine and keeps its traceback.
    """


@contextmanager
def exit_on_user_error(renamed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn a `UserError` into one readable message and exit status 2.

    Args:
        renamed: beginnings of a run's flags that are called otherwise here, such as
            `{"--distillation.": "--"}`; the message has the script's own.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            message = str(error)
            for name, own in (renamed or {}).items():
                message = message.replace(name, own)
            print(f"error: {message}", file=sys.stderr)
        # Not `sys.exit`: under a launcher every rank must leave with a non-zero status.
        raise SystemExit(2) from None
