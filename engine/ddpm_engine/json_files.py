"""JSON as its standard has it, read and written.

People write some of what is read; whatever is wrong with it is said in one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_engine.errors import UserError

MAX_BYTES = 16 * 2**20
"""No configuration is longer: a damaged or hostile file must not take all memory."""

_MAX_DEPTH = 64
_LONG = 80  # characters
_EXACT = 2**53  # floating point has every integer up to here
_LARGEST = 2**1023


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Python's own reader also takes NaN and infinity, which are no JSON, and of keys that are given
    twice silently the last; neither is accepted here.

    Args:
        path: of the file.
        max_bytes: that it may have.

    Raises:
        UserError: it cannot be read, is no JSON, or has more than `max_bytes` or 64 levels.
        FileNotFoundError: there is none; what to do about that, the caller knows.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(content) > max_bytes:
        raise UserError(
            f"{path} has more than {max_bytes} bytes, which no such file has; is it the right one?"
        )
    return parse_json(content, str(path))


def parse_json(content: bytes, origin: str) -> Any:
    """Parse the content of a JSON file, as `read_json`.

    Args:
        content: of the file.
        origin: its name, for messages.

    Raises:
        UserError: naming `origin`.
    """
    if not content.strip():
        raise UserError(f"{origin} is empty; write or download it again")
    try:
        text = content.decode(json.detect_encoding(content))
        values = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not JSON: it is no text in {error.encoding}") from None
    except ValueError as error:
        raise UserError(f"{origin} is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep(origin) from None
    _check(values, origin)
    return values


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object, as `read_json`.

    Raises:
        UserError: as `read_json`, or it holds something else.
        FileNotFoundError: there is no such file.
    """
    values = read_json(path, max_bytes)
    if not isinstance(values, dict):
        raise UserError(f"{path} is {described(values)}, not a JSON object with entries")
    return values


def as_int(value: Any) -> int | None:
    """A JSON number as an integer, which 1e3 and 20.0 are too; None: it is something else."""
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return value if type(value) is int else None


def as_float(value: Any) -> float | None:
    """A JSON number as floating point; None: it is something else, or not finite."""
    if type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    return value if type(value) is float and math.isfinite(value) else None


def described(value: Any) -> str:
    """A JSON value in a message: as it is written, if that is short."""
    text = json.dumps(value, default=repr)
    if len(text) <= _LONG:
        return text
    kinds: dict[type, str] = {dict: "a long JSON object", list: "a long JSON list"}
    return kinds.get(type(value), f"{text[:_LONG]}...")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has the key {described(name)} twice; leave one")
        values[name] = value
    return values


_UNBOUNDED = ("lambda_min_clipped",)
"""Bounds that diffusers writes as -Infinity where there are none."""


def _check(values: Any, origin: str) -> None:
    """Refuse numbers that are not finite, and more levels than any file has."""
    # By the nearest key: longer names of many entries could take more memory than the file.
    level: list[tuple[str, Any]] = [("it", values)]
    for _ in range(_MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            for key, entry in _entries(name, value):
                if isinstance(entry, dict | list):
                    below.append((key, entry))
                elif isinstance(entry, float) and not math.isfinite(entry):
                    if key in _UNBOUNDED and math.isinf(entry):
                        continue
                    raise UserError(
                        f"{key} is {json.dumps(entry)} in {origin}, which is no JSON number; "
                        "write a finite one"
                    )
        if not below:
            return
        level = below
    raise _too_deep(origin)


def _entries(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return value.items()
    return ((name, entry) for entry in (value if isinstance(value, list) else [value]))


def _too_deep(origin: str) -> UserError:
    return UserError(f"{origin} has more than {_MAX_DEPTH} levels, which no such file has")


def to_json(value: Any, **options: Any) -> str:
    """Convert to JSON; a number that is not finite, for which JSON has no word, becomes null.

    Args:
        value: as `json.dumps` takes it.
        options: of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value
