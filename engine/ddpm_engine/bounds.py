"""Bounds on the fields of a configuration, as annotations: `steps: Annotated[int, Ge(1)]`."""

from __future__ import annotations

from collections.abc import Iterator
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


def out_of_bounds(config: Any) -> Iterator[UserError]:
    """Report every field whose value is outside its bounds; None has none.

    The bounds of a tuple's entries hold for each of them.

    Args:
        config: an instance of a dataclass.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        bounds, each = _bounds_of(kind)
        value = getattr(config, name)
        values = () if value is None else value if each else (value,)
        if not all(_holds(bound, entry) for entry in values for bound in bounds):
            subject = "each" if each else "it"
            yield UserError(f"`{name}` is {value}; {subject} must {_described(bounds)}", name)


def _bounds_of(kind: Any) -> tuple[list[Bound], bool]:
    """The bounds in an annotation, and whether they are of each entry of a tuple."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return [bound for bound in arguments[1:] if isinstance(bound, Bound)], False
    if origin in (Union, UnionType, tuple):
        for argument in arguments:
            bounds, each = _bounds_of(argument)
            if bounds:
                return bounds, each or origin is tuple
    return [], False


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


def _described(bounds: list[Bound]) -> str:
    match bounds:
        case [Gt(gt=0)]:
            return "be positive"
        case [Ge(ge=0)]:
            return "not be negative"
        case [Ge(ge=least)]:
            return f"be at least {least}"
    low, high = bounds
    opening, first = ("[", low.ge) if isinstance(low, Ge) else ("(", low.gt)  # type: ignore[union-attr]
    closing, last = ("]", high.le) if isinstance(high, Le) else (")", high.lt)  # type: ignore[union-attr]
    return f"lie in {opening}{first:g}, {last:g}{closing}"
