"""Reading another library's JSON configuration so that nothing in it is overlooked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.json_files import as_float, as_int, described, read_object

T = TypeVar("T")

_LISTED = 8
_LARGEST = 1_000_000
"""A damaged or hostile file should not make us reserve all memory."""

_NAMES: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string in quotes",
    list: "a list",
}  # fmt: skip
_CONVERSIONS: dict[type, Callable[[Any], Any]] = {int: as_int, float: as_float}


class Entries:
    """The entries of a JSON object, each of which must be taken, required or ignored by name.

    Args:
        path: of the file.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = read_part(path)
        self._known: set[str] = set()

    def take_any(self, name: str, default: Any) -> Any:
        """Remove an entry and return it, whatever its type; `default` if it is absent."""
        self._known.add(name)
        return self._left.pop(name, default)

    def take(self, name: str, kind: type[T], default: T) -> T:
        """Remove an entry and return it; `default` if it is absent.

        Raises:
            UserError: the value is not a `kind`.
        """
        given = self.take_any(name, default)
        value = _CONVERSIONS[kind](given) if kind in _CONVERSIONS else given
        # Exactly the type: a bool is an int to `isinstance`.
        if type(value) is not kind:
            self.refuse(name, given, f"it must be {_NAMES[kind]}")
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # nor is NaN
            self.refuse(name, given, f"no such number is greater than {_LARGEST}")
        return value

    def take_optional(self, name: str, kind: type[T], default: T | None) -> T | None:
        """As `take`, of an entry that may be null."""
        if self._left.get(name, default) is None:
            self.take_any(name, None)
            return None
        return self.take(name, kind, default)

    def require(self, name: str, supported: tuple[Any, ...], default: Any) -> None:
        """Remove an entry of which only some values can be honoured.

        Raises:
            UserError: it has, or by default would have, another value.
        """
        value = self.take_any(name, default)
        # To Python, false is 0 and true is 1.
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported
        ):
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
            listed = ", ".join(self._unknown(name, value) for name, value in unknown.items())
            raise UserError(
                f"{self.path} has entries that this version does not know: {listed}; they might "
                "change samples, so remove them only if you know that they do not"
            )

    def _unknown(self, name: str, value: Any) -> str:
        meant = get_close_matches(name, self._known, n=1)
        asked = f" (did you mean {meant[0]}?)" if meant else ""
        return f"{name} = {described(value)}{asked}"

    def refuse(self, name: str, value: Any, reason: str) -> NoReturn:
        """Refuse one entry.

        Raises:
            UserError: always; it names the file, the entry and the reason.
        """
        raise UserError(f"{name} is {described(value)} in {self.path}: {reason}")


def listing(folder: Path) -> str:
    """What a folder holds, for messages that say what is missing there."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
    except OSError:
        return "nothing that can be read"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}" if names else "nothing"


def read_part(path: Path) -> dict[str, Any]:
    """Read a JSON object of a saved model.

    Raises:
        UserError: the file is missing, unreadable, or something else.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download or save the whole model again") from None
