"""Reading another library's JSON configuration so that nothing in it is overlooked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError
from ddpm_engine.json_text import to_json

T = TypeVar("T")

_LARGEST = 1_000_000
"""A damaged or hostile file should not make us reserve all memory."""


class Entries:
    """The entries of a JSON object, each of which must be taken, required or ignored by name.

    Args:
        path: of the file.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = read_json(path)

    def take_any(self, name: str, default: Any) -> Any:
        """Remove an entry and return it, whatever its type; `default` if it is absent."""
        return self._left.pop(name, default)

    def take(self, name: str, kind: type[T], default: T) -> T:
        """Remove an entry and return it; `default` if it is absent.

        Raises:
            UserError: the value is not a `kind`.
        """
        value = self._left.pop(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        # Exactly the type: a bool is an int to `isinstance`.
        if type(value) is not kind:
            self.refuse(name, value, f"it must be of type {kind.__name__}")
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # nor is NaN
            self.refuse(name, value, f"no such number is greater than {_LARGEST}")
        return value

    def take_optional(self, name: str, kind: type[T], default: T | None) -> T | None:
        """As `take`, of an entry that may be null."""
        if self._left.get(name, default) is None:
            self._left.pop(name, None)
            return None
        return self.take(name, kind, default)

    def require(self, name: str, supported: tuple[Any, ...], default: Any) -> None:
        """Remove an entry of which only some values can be honoured.

        Raises:
            UserError: it has, or by default would have, another value.
        """
        value = self._left.pop(name, default)
        if value not in supported:
            listed = " or ".join(map(json.dumps, supported))
            self.refuse(name, value, f"this engine has only {listed}")

    def finish(self, ignored: Iterable[str]) -> None:
        """Check that nothing is left that might change samples.

        Raises:
            UserError: naming the entries that this version does not know.
        """
        unknown = {
            name: value
            for name, value in self._left.items()
            if name not in set(ignored) and not name.startswith("_")
        }
        if unknown:
            listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in unknown.items())
            raise UserError(
                f"{self.path} has entries that this version does not know: {listed}; they might "
                "change samples, so remove them only if you know that they do not"
            )

    def refuse(self, name: str, value: Any, reason: str) -> NoReturn:
        """Refuse one entry.

        Raises:
            UserError: always; it names the file, the entry and the reason.
        """
        raise UserError(f"{name} is {json.dumps(value)} in {self.path}: {reason}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    with atomic_write(path) as file:
        file.write((to_json(values, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download or save the whole model again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is a JSON {type(values).__name__}, not an object with entries")
    return values
