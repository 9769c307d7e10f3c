"""What command lines have in common."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import docstring_parser
import torch
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ddpm_engine.bounds import Ge, values_out_of_bounds
from ddpm_engine.cache_directories import provide_for_no_home
from ddpm_engine.cli.errors import exit_in_one_line, refuse
from ddpm_engine.errors import UserError
from ddpm_engine.locations import location, user_path

# Here, because commands import this before the libraries that look for a home.
provide_for_no_home()

T = TypeVar("T")


Positive = Annotated[int, Ge(1)]
"""A whole number from 1."""
PositiveOrNone = Positive | None
"""As `Positive`, or None."""


def _device(words: list[str]) -> str:
    try:
        return str(torch.device(words[0]))
    except RuntimeError:
        raise ValueError(
            f"{words[0]!r} is no device; give cpu, cuda or one such as cuda:1"
        ) from None


Device = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="DEVICE",
        instance_from_str=_device,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""Where torch computes."""


_FORMER_FLAGS = {"--training.ema-profiles": "--training.ema-sigma-rel"}
"""Flags that are still understood, and what they are called now."""


def parse_options(
    options: Callable[..., T],
    arguments: Sequence[str] | None = None,
    *,
    default: T | None = None,
    prog: str | None = None,
    omit_prefixes: bool = False,
) -> T:
    """Read a command line into a dataclass, or call a function with it.

    The docstring of an attribute is the help of its flag. If it ends in `; default: X.`, the help
    names X as the default instead of the value, which then stands for X, such as None.

    A mistake ends the process with status 2, naming the flag, or those that may have been meant;
    `--help` ends it with status 0. Numbers have the bounds in their annotations. In paths, `~` is
    expanded.

    Args:
        options: a dataclass, or a function with an `Args:` section.
        arguments: of the command line; None: the process's own.
        default: where defaults come from, if not from the class.
        prog: name of the program; None: the script's.
        omit_prefixes: name the fields of a section `--field`, not `--section.field`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    words = [_FORMER_FLAGS.get(word.replace("_", "-"), word) for word in words]
    given: dict[str, Any] = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes,) if omit_prefixes else ()
    with _registry():
        parsed = tyro.cli(_checked(options), args=words, prog=prog, config=config, **given)
    if dataclasses.is_dataclass(options):
        _check_bounds(vars(parsed), options, omit_prefixes)
    return parsed


def parse_command(commands: dict[str, Callable[..., T]]) -> T:
    """Call the function named by the first argument, with the rest; help as `parse_options`."""
    with _registry():
        checked = {name: _checked(command) for name, command in commands.items()}
        return tyro.extras.subcommand_cli_from_dict(checked)


def _checked(command: Callable[..., T]) -> Callable[..., T]:
    """A function that is called only with values within the bounds of its annotations."""
    if not inspect.isfunction(command):
        return command

    @wraps(command)
    def checked(*arguments: Any, **options: Any) -> T:
        given = inspect.signature(command).bind(*arguments, **options).arguments
        _check_bounds(given, command)
        return command(*arguments, **options)

    return checked


def _check_bounds(
    values: Mapping[str, Any], command: Callable[..., Any], omit_prefixes: bool = False
) -> None:
    found = [
        problem
        for name, kind, value in _options(values, command, omit_prefixes)
        for problem in values_out_of_bounds({name: kind}, {name: value})
    ]
    if found:
        names = {name for name, _, _ in _options(values, command, omit_prefixes)}
        raise refuse(with_flags("\n       ".join(map(str, found)), names, {}))


def _options(
    values: Mapping[str, Any], command: Callable[..., Any], omit_prefixes: bool, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and value of every option of a command, the names as in `option_names`."""
    for name, kind, option in _fields(command):
        if name not in values:
            continue
        if dataclasses.is_dataclass(values[name]):
            section = prefix if omit_prefixes or not option else f"{prefix}{option}."
            inner = type(values[name])
            yield from _options(vars(values[name]), inner, omit_prefixes, section)
        else:
            yield prefix + option, kind, values[name]


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Args:
        flag: its name, without dashes.
        text: what it was given.

    Raises:
        UserError: anything else.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{flag} is {text!r}; it takes whole numbers, as 17,42") from None
    for problem in values_out_of_bounds({flag: tuple[int, ...]}, {flag: found}):
        raise UserError(str(problem).replace(f"`{flag}`", f"--{flag}"))
    return found


@contextmanager
def exit_on_error(
    *commands: Callable[..., Any],
    omit_prefixes: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """As `exit_in_one_line`, with the flags of a command for fields that a message names.

    They stand in backticks; see `with_flags`.

    Args:
        commands: as `parse_options` takes them; their flags are those that a message can name.
        omit_prefixes: as in `parse_options`.
        renamed: options of the command that are not named as the field they set: field to option,
            or section to section if both end in a dot, such as `{"distillation.": ""}`.
    """
    names = {name for one in commands for name in option_names(one, omit_prefixes)}
    with exit_in_one_line(lambda message: with_flags(message, names, renamed or {})):
        yield


def with_flags(message: str, options: Set[str], renamed: Mapping[str, str]) -> str:
    """Replace every field in backticks that an option sets by the option's flag.

    Args:
        message: of a `UserError`.
        options: dotted names of the command's options.
        renamed: see `exit_on_error`.
    """

    def flag(match: re.Match[str]) -> str:
        field = match[1]
        for name, option in renamed.items():
            if field == name or (name.endswith(".") and field.startswith(name)):
                field = option + field[len(name) :]
        return f"--{field.replace('_', '-')}" if field in options else match[0]

    return re.sub(r"`([a-z][a-z0-9_.]*)`", flag, message)


def option_names(
    command: Callable[..., Any], omit_prefixes: bool = False, prefix: str = ""
) -> Iterator[str]:
    """Dotted names of a command's options, which are its flags but for dashes.

    Args:
        command: as `parse_options` takes it.
        omit_prefixes: as in `parse_options`.
        prefix: what all names begin with.
    """
    for _, annotated, option in _fields(command):
        kind, *metadata = (
            get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        )
        if _POSITIONAL in metadata:
            continue
        sections = (kind,) if dataclasses.is_dataclass(kind) else _alternatives(kind)
        for section in sections:
            inner = prefix if omit_prefixes or not option else f"{prefix}{option}."
            yield from option_names(cast(Callable[..., Any], section), omit_prefixes, inner)
        if not sections:
            yield prefix + option


def _fields(command: Callable[..., Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, type and option's name of each field of a dataclass or argument of a function."""
    for name, annotated in get_type_hints(command, include_extras=True).items():
        metadata = get_args(annotated)[1:] if get_origin(annotated) is Annotated else ()
        named = [given for entry in metadata if (given := getattr(entry, "name", None)) is not None]
        if name != "return":
            yield name, annotated, named[0] if named else name


_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


@cache
def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_rule)
    registry.primitive_rule(_path_rule)
    registry.primitive_rule(_location_rule)
    return registry


def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: user_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _location_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A path or a URL; as a path, a URL would lose one of its slashes."""
    kinds = set(get_args(info.type))
    if not {Path, str} <= kinds <= {Path, str, type(None)}:
        return None
    optional = type(None) in kinds
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH|URL" if optional else "PATH|URL",
        instance_from_str=lambda words: (
            None if optional and words[0] == "None" else location(words[0])
        ),
        is_instance=lambda value: isinstance(value, Path | str) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


def _rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """As tyro's own, but for the help: see `parse_options`."""
    if info.type.__module__.startswith("tyro."):  # what it wraps others in
        return None
    if dataclasses.is_dataclass(info.type):
        defaults = {f.name: _default(f, info.default) for f in dataclasses.fields(info.type)}
    elif inspect.isfunction(info.type):
        parameters = inspect.signature(info.type).parameters
        defaults = {
            name: tyro.MISSING_NONPROP if p.default is p.empty else p.default
            for name, p in parameters.items()
        }
    else:
        return None
    kinds = get_type_hints(info.type, include_extras=True)
    texts = {
        part.arg_name: " ".join((part.description or "").split())
        for part in docstring_parser.parse_from_object(info.type).params
    }
    fields = []
    for name, default in defaults.items():
        text, hint = _help(texts.get(name, ""))
        kind: Any = _of_default(kinds[name], default)
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint=hint)]
        fields.append(StructFieldSpec(name, kind, default, text or None))
    return StructConstructorSpec(info.type, tuple(fields))


def _of_default(kind: Any, default: Any) -> Any:
    """Of several classes of options, that of the default, whose flags the command line takes."""
    return type(default) if _alternatives(kind) and dataclasses.is_dataclass(default) else kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The classes that an option may be of, if these are several dataclasses."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return kinds if kinds and all(map(dataclasses.is_dataclass, kinds)) else ()


def _default(field: dataclasses.Field[Any], instance: Any) -> Any:
    if dataclasses.is_dataclass(instance):
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING_NONPROP


def _help(text: str) -> tuple[str, Callable[[str], str]]:
    """Split a docstring into the help of the flag and the text of its default."""
    named = re.fullmatch(r"(.*?)(?:[;,.] |^)default:? ([^;]+)\.", text, re.IGNORECASE)
    unset = "None" if named is None else named[2]
    if named is not None:
        text = f"{named[1]}." if named[1] else ""
    return text, lambda value: f"(default: {unset if value in ('None', '') else value})"
