"""Where things are, as people write it: a path on this machine, or a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ddpm_engine.errors import UserError

_USER = re.compile(r"(?<=://)[^/\s]*@")
_USER_OF_A_PATH = re.compile(r"(?<=:/)/?[^/\s]*@")
HIDDEN = "***@"
"""What stands for the user and the password of a URL wherever it is shown or recorded."""

# A path keeps one of a URL's slashes.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/]")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in location


def is_http(location: str) -> bool:
    """Whether a location is an http(s) URL."""
    return location.lower().startswith(("http://", "https://"))


def is_location(path: str) -> bool:
    """Whether a string is a URL, or a command for a pipe, rather than a path."""
    return is_url(path) or path.startswith("pipe:")


def redacted(text: str) -> str:
    """Hide users and passwords in the URLs of a text, which may be a URL itself."""
    return _USER.sub(HIDDEN, text)


def user_of(url: str) -> str | None:
    """The user, or the user and the password, that a URL names; None if it names none."""
    found = _USER.search(url)
    return None if found is None else found[0].removesuffix("@")


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


def location(text: str) -> Path | str:
    """A URL, or a command for a pipe, as it is, and anything else as `user_path`.

    Raises:
        UserError: as `user_path`.
    """
    return text if is_location(text) else user_path(text)


def check_local(path: Path | str, field: str | None = None, urls: bool = False) -> None:
    """Check that a path is not a URL, of which a path keeps one slash, nor one of another system.

    Args:
        path: that a folder or a file is made at, or looked for.
        field: that named it.
        urls: whether a URL would do there, for the message.

    Raises:
        UserError: it is; the message says what to give instead.
    """
    if urls and is_location(str(path)):
        return
    text = _USER_OF_A_PATH.sub(HIDDEN, str(path))
    name = "" if field is None else f"`{field}` "
    if Path(path).exists() or Path(text.partition("/")[0]).exists():
        return
    if _WINDOWS.match(text):
        raise UserError(f"{name}{text} is a path of Windows; give one of this system", field)
    if not _URL.match(text):
        return
    if urls:
        scheme, _, rest = text.partition(":/")
        raise UserError(
            f"{name}{text} has one slash where a URL has two; give {scheme}://{rest.lstrip('/')}",
            field,
        )
    raise UserError(f"{name}{text} is a URL, and this takes a path on this machine only", field)
