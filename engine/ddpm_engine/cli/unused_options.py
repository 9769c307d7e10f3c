"""Options that do nothing in a combination, which are refused instead of being ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any

from ddpm_engine.errors import UserError


def refuse_unused(
    options: Any, used_by: Mapping[str, Set[str]], purposes: Set[str], described: str
) -> None:
    """Refuse options that differ from their default and that nothing in the combination uses.

    Args:
        options: a dataclass of options, or of sections of them.
        used_by: option to the purposes that use it; options that are not in it are always used.
        purposes: those of the combination.
        described: the combination, as in "`samples`".

    Raises:
        UserError: the first of them.
    """
    for name in given(options):
        if name in used_by and not used_by[name] & purposes:
            raise UserError(f"`{name}` does nothing with {described}; leave it out", name)


def given(options: Any) -> Iterator[str]:
    """Yield the names of options that differ from their default, those in sections too."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from given(value)
        elif value != field.default:
            yield field.name
