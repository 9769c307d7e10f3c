"""What command lines have in common."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

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

from ddpm_engine.cache_directories import provide_for_no_home
from ddpm_engine.errors import UserError
from ddpm_engine.locations import location

# Here, because commands import this before the libraries that look for a home.
provide_for_no_home()

T = TypeVar("T")


def at_least(least: int, or_none: bool = False) -> PrimitiveConstructorSpec[int | None]:
    """Refuse smaller numbers, with the flag named: `Annotated[int, at_least(2)]`."""

    def number(words: list[str]) -> int | None:
        if or_none and words == ["None"]:
            return None
        try:
            value = int(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not a whole number") from None
        if value < least:
            raise ValueError(f"{value} is too small: it must be at least {least}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|INT" if or_none else "INT",
        instance_from_str=number,
        is_instance=lambda value: isinstance(value, int) or (or_none and value is None),
        str_from_instance=lambda value: [str(value)],
    )


Positive = Annotated[int, at_least(1)]
"""A whole number from 1."""
PositiveOrNone = Annotated[int | None, at_least(1, or_none=True)]
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

    A mistake ends the process with status 2, naming the flags that may have been meant; `--help`
    ends it with status 0.

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
        return tyro.cli(options, args=words, prog=prog, config=config, **given)


def parse_command(commands: dict[str, Callable[..., T]]) -> T:
    """Call the function named by the first argument, with the rest; help as `parse_options`."""
    with _registry():
        return tyro.extras.subcommand_cli_from_dict(commands)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Args:
        flag: its name, without dashes.
        text: what it was given.

    Raises:
        UserError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{flag} is {text!r}; it takes whole numbers, as 17,42") from None


@contextmanager
def exit_on_user_error(
    *commands: Callable[..., Any],
    omit_prefixes: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Turn a `UserError` into one readable message and exit status 2.

    The message names fields in backticks, and `with_flags` turns them into flags.

    Args:
        commands: as `parse_options` takes them; their flags are those that a message can name.
        omit_prefixes: as in `parse_options`.
        renamed: options of the command that are not named as the field they set: field to option,
            or section to section if both end in a dot, such as `{"distillation.": ""}`.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            names = {name for one in commands for name in option_names(one, omit_prefixes)}
            print(f"error: {with_flags(str(error), names, renamed or {})}", file=sys.stderr)
        # Not `sys.exit`: under a launcher every rank must leave with a non-zero status.
        raise SystemExit(2) from None


def with_flags(message: str, options: Set[str], renamed: Mapping[str, str]) -> str:
    """Replace every field in backticks that an option sets by the option's flag.

    Args:
        message: of a `UserError`.
        options: dotted names of the command's options.
        renamed: see `exit_on_user_error`.
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
    for name, annotated in get_type_hints(command, include_extras=True).items():
        kind, *metadata = (
            get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        )
        if name == "return" or _POSITIONAL in metadata:
            continue
        named = [given for entry in metadata if (given := getattr(entry, "name", None)) is not None]
        name = named[0] if named else name
        if dataclasses.is_dataclass(kind):
            section = prefix if omit_prefixes or not name else f"{prefix}{name}."
            yield from option_names(cast(Callable[..., Any], kind), omit_prefixes, section)
        else:
            yield prefix + name


_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


@cache
def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_rule)
    registry.primitive_rule(_location_rule)
    return registry


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
        kind: Any = Annotated[kinds[name], tyro.conf.arg(help_behavior_hint=hint)]
        fields.append(StructFieldSpec(name, kind, default, text or None))
    return StructConstructorSpec(info.type, tuple(fields))


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
