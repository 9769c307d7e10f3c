"""Text from names of files, which need not be text in any encoding."""

from __future__ import annotations

import re

_UNDECODED = re.compile("[\udc80-\udcff]")  # how Python's strings hold bytes that are not UTF-8


def printable(text: str) -> str:
    r"""Return text that every encoding of Unicode can write, with undecoded bytes as `\xe9`."""
    escaped = _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")
