"""Bounds on the fields of a configuration, as annotations: `steps: Annotated[int, Ge(1)]`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ddpm_engine.errors import UserError


@dataclass(frozen=True)
class Ge:
    """At least `ge`."""

    ge: float


@dataclass(frozen=True)
class Gt:
    """Above `gt`."""

    gt: float


@dataclass(frozen=True)
class Le:
    """At most `le`."""

    le: float


@dataclass(frozen=True)
class Lt:
    """Below `lt`."""

    lt: float


Bound = Ge | Gt | Le | Lt

INT64 = 2**63
_SHOWN = 8  # entries of a tuple


def out_of_bounds(config: Any) -> Iterator[UserError]:
    """Report every field whose value is outside its bounds; None has none.

    See `values_out_of_bounds`.

    Args:
        config: an instance of a dataclass.
    """
    kinds = get_type_hints(type(config), include_extras=True)
    return values_out_of_bounds(kinds, {name: getattr(config, name) for name in kinds})


def values_out_of_bounds(
    kinds: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[UserError]:
    """Report every value outside the bounds of its annotation.

    Numbers without bounds have those of their types: an integer must fit into 64 bits with a sign
    unless it has its own upper bound, and a float be finite unless it is `Le(math.inf)`. The bounds
    of a tuple's entries hold for each of them.

    Args:
        kinds: annotations by name.
        values: by the same names.
    """
    for name, kind in kinds.items():
        value = values[name]
        for number, bounds, each in _numbers(kind, value):
            reason = _violated(number, bounds)
            if reason is not None:
                whole = value if not each or len(value) <= _SHOWN else f"{value[:_SHOWN]} …"
                subject = f"each, and {number} among them," if whole is not value else "each"
                yield UserError(
                    f"`{name}` is {whole}; {subject if each else 'it'} must {reason}", name
                )
                break


def _numbers(kind: Any, value: Any) -> Iterator[tuple[float, list[Bound], bool]]:
    """The numbers in a value, each with its bounds, and whether it is an entry of a tuple."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for bound in arguments[1:] if isinstance(bound, Bound)]
        for number, inner, each in _numbers(arguments[0], value):
            yield number, bounds + inner, each
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _numbers(argument, value)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        for one, entry in zip(kinds, value, strict=False):
            yield from ((number, bounds, True) for number, bounds, _ in _numbers(one, entry))
    elif kind in (int, float) and isinstance(value, int | float):
        yield value, [], False


def _violated(number: float, bounds: list[Bound]) -> str | None:
    """What a number must do and does not."""
    if not all(_holds(bound, number) for bound in bounds):
        return _described(bounds, number)
    unlimited = any(isinstance(bound, Le) and bound.le == math.inf for bound in bounds)
    if isinstance(number, float) and not math.isfinite(number) and not unlimited:
        return "be finite"
    capped = any(isinstance(bound, Le | Lt) for bound in bounds)
    if isinstance(number, int) and not capped and not -INT64 <= number < INT64:
        return f"lie in [{-INT64}, {INT64 - 1}]"
    return None


def _holds(bound: Bound, value: float) -> bool:
    match bound:
        case Ge(ge=least):
            return bool(value >= least)
        case Gt(gt=below):
            return bool(value > below)
        case Le(le=most):
            return bool(value <= most)
        case Lt(lt=above):
            return bool(value < above)


def _described(bounds: list[Bound], number: float) -> str:
    match bounds:
        case [Ge(ge=1), Le(le=most)]:  # a number of something
            return "be at least 1" if number < 1 else f"be at most {_written(most)}"
        case [Gt(gt=0)]:
            return "be positive"
        case [Ge(ge=0)]:
            return "not be negative"
        case [Gt(gt=0), Le(le=math.inf)]:
            return "be positive"
        case [Ge(ge=least)]:
            return f"be at least {_written(least)}"
        case [Gt(gt=least)]:
            return f"be above {_written(least)}"
        case [Le(le=most)]:
            return f"be at most {_written(most)}"
        case [Lt(lt=most)]:
            return f"be below {_written(most)}"
    low, high = bounds
    opening, first = ("[", low.ge) if isinstance(low, Ge) else ("(", low.gt)  # type: ignore[union-attr]
    closing, last = ("]", high.le) if isinstance(high, Le) else (")", high.lt)  # type: ignore[union-attr]
    return f"lie in {opening}{_written(first)}, {_written(last)}{closing}"


def _written(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
