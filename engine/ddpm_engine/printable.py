"""Text from names of files, which need not be text in any encoding."""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_engine.errors import UserError

_UNDECODED = re.compile("[\udc80-\udcff]")  # how Python's strings hold bytes that are not UTF-8


def printable(text: str) -> str:
    r"""Return text that every encoding of Unicode can write, with undecoded bytes as `\xe9`."""
    escaped = _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")


def check_utf8(path: Path, field: str | None = None) -> None:
    """Refuse a path of weights that is not UTF-8: safetensors opens no other.

    Args:
        path: of the weights, or of a folder of them.
        field: that it is from.

    Raises:
        UserError: some bytes of it are not UTF-8.
    """
    if _UNDECODED.search(str(path)):
        named = "" if field is None else f"`{field}` "
        raise UserError(
            f"{named}{printable(str(path))} is not UTF-8, and safetensors, the format of weights, "
            "can only be read from paths that are; choose another name",
            field,
        )
