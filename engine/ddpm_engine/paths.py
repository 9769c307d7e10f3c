"""The paths that people give: on a command line, in a file, in Python."""

from __future__ import annotations

import os
from pathlib import Path

from ddpm_engine.errors import UserError


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a person means, with `~` and `~name` expanded.

    Raises:
        UserError: it is empty, or no path at all.
    """
    written = os.fspath(text)
    if not written:
        raise UserError("a path is empty; name one, or . for the current folder")
    if "\0" in written:
        raise UserError(f"{written!r} has a zero byte, which no path has")
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        raise UserError(f"{written!r} has characters that no path has here") from None
    return Path(os.path.expanduser(written))
