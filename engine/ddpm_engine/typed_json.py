"""JSON values as dataclasses and back: every value is of the field's type, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ddpm_engine.errors import UserError
from ddpm_engine.json_files import as_float, as_int, described
from ddpm_engine.paths import user_path

Reader = Callable[[Any, str], Any]
"""Reads a JSON value, given the dotted name of its place; raises `Mismatch`."""


class Mismatch(Exception):
    """JSON values that are not what their places hold.

    Args:
        problems: sentences that name place, value and what is right.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems


def structure(
    kind: Any, value: Any, where: str = "", special: Mapping[Any, Reader] | None = None
) -> Any:
    """Read a JSON value as a type that annotates a field.

    Booleans, strings and numbers are never taken for one another; but any number stands for a
    float, and 1e3 or 20.0 for an integer. Lists are tuples. Absent fields have their defaults.

    Args:
        kind: a dataclass, bool, int, float, str, Path, a literal, a tuple, or a union of these.
        value: as a JSON file has it.
        where: dotted name of its place.
        special: readers for types that need their own.

    Raises:
        Mismatch: reports every value that is wrong.
    """
    readers = special or {}
    if kind in readers:
        return readers[kind](value, where)
    if kind is Any:
        return value
    if kind is Path:
        return _path(value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return structure(arguments[0], value, where, readers)
    if origin in (Union, UnionType):
        return _one_of(kind, value, where, readers)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _listed(kind, value, where, readers)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where, readers)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
    elif kind in _SCALARS:
        read = _SCALARS[kind](value)
        if read is not None:
            return read
    raise wrong(value, where, _right(kind))


def plain(value: Any) -> Any:
    """Convert a dataclass, or what one holds, to JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def wrong(value: Any, where: str, right: str) -> Mismatch:
    """A value that is not what its place holds, which is `right`."""
    return Mismatch(f"{where or 'it'} is {described(value)}; it must be {right}")


def _one_of(kind: Any, value: Any, where: str, readers: Mapping[Any, Reader]) -> Any:
    kinds = get_args(kind)
    if value is None and NoneType in kinds:
        return None
    others = [one for one in kinds if one is not NoneType]
    for one in others:
        try:
            return structure(one, value, where, readers)
        except Mismatch:
            # It names the entries of a list, or the reason why a string is no path.
            if len(others) == 1 and (isinstance(value, list | dict) or one is Path):
                raise
    raise wrong(value, where, _right(kind))


def _listed(
    kind: Any, values: list[Any] | tuple[Any, ...], where: str, readers: Mapping[Any, Reader]
) -> Any:
    origin: Any = get_origin(kind)
    kinds = get_args(kind)
    if origin is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        raise wrong(values, where, f"a list of {len(kinds)}")
    read: list[Any] = []
    problems: list[str] = []
    for index, (one, value) in enumerate(zip(kinds, values, strict=True)):
        try:
            read.append(structure(one, value, f"{where}[{index}]", readers))
        except Mismatch as mismatch:
            problems += mismatch.problems
    if problems:
        raise Mismatch(*problems[:_MOST])
    return origin(read)


def _dataclass(kind: Any, values: dict[str, Any], where: str, readers: Mapping[Any, Reader]) -> Any:
    kinds = get_type_hints(kind, include_extras=True)
    names = [one.name for one in dataclasses.fields(kind) if one.init]
    prefix = f"{where}." if where else ""
    problems = [_unknown(name, names, prefix) for name in values if name not in names]
    read = {}
    for name in names:
        if name in values:
            try:
                read[name] = structure(kinds[name], values[name], prefix + name, readers)
            except Mismatch as mismatch:
                problems += mismatch.problems
    missing = [
        one.name
        for one in dataclasses.fields(kind)
        if one.init
        and one.name not in values
        and one.default is dataclasses.MISSING
        and one.default_factory is dataclasses.MISSING
    ]
    problems += [f"{prefix}{name} is missing" for name in missing]
    if problems:
        raise Mismatch(*problems)
    return kind(**read)


def _unknown(name: str, names: list[str], prefix: str) -> str:
    meant = get_close_matches(name, names, n=1)
    hint = f"did you mean {prefix}{meant[0]}?" if meant else "leave it out"
    return f"{prefix}{described(name)[1:-1]} is unknown; {hint}"


def _path(value: Any, where: str) -> Path:
    if type(value) is not str:
        raise wrong(value, where, _right(Path))
    try:
        return user_path(value)
    except UserError as error:
        raise Mismatch(f"{where}: {error}") from None


_MOST = 5  # entries of one list that are named
_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: lambda value: value if type(value) is bool else None,
    int: as_int,
    float: as_float,
    str: lambda value: value if type(value) is str else None,
}
_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string in quotes",
    Path: "a path in quotes", NoneType: "null",
}  # fmt: skip


def _right(kind: Any) -> str:
    """What a place of this type holds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _right(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_right(one) for one in arguments))
    if origin is Literal:
        return " or ".join(map(described, arguments))
    if origin in (tuple, list):
        return "a list"
    return _NAMES.get(kind, "a JSON object")
