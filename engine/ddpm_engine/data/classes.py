"""Classes by name: a class has a number within one set or one model only, and its name anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpm_engine.errors import UserError

ClassNames = tuple[str, ...]
"""Names of the classes 0, 1, ..."""

_LISTED = 12


def check_same_classes(
    names: ClassNames | None, place: str, others: ClassNames | None, other_place: str
) -> None:
    """Check that a number means the same class in both, as far as both have names.

    Raises:
        UserError: it does not; the message names both places, and lists their classes.
    """
    names, others = names or (), others or ()
    for number, (one, two) in enumerate(zip(names, others, strict=False)):
        if one != two:
            raise UserError(
                f"class {number} is {one!r} in {place} and {two!r} in {other_place}, whose classes "
                f"are {listed(names)} and {listed(others)}: they must agree, so pack the images "
                "again with the same class folders"
            )


def match_classes(
    known: ClassNames | None, count: int, names: ClassNames, place: str, whose: str = "the model"
) -> list[int]:
    """Find the classes of a data set among those of a model, by name.

    Where the model has no names, or the set's are just its numbers and not among the model's,
    a number is taken for itself.

    Args:
        known: names of the model's classes; None: of a model that has only numbers.
        count: number of the model's classes.
        names: names of the set's classes.
        place: where the set is, for the message.
        whose: who has the classes that are known, for the message.

    Returns:
        The model's class for each class of the set.

    Raises:
        UserError: a class that the model does not have; the message lists both.
    """
    if known is not None and set(names) <= set(known):
        return [known.index(name) for name in names]
    numbers = names == tuple(map(str, range(len(names))))
    if len(names) <= count and (known is None or numbers):
        return list(range(len(names)))
    theirs = f"{count} without names" if known is None else listed(known)
    raise UserError(
        f"classes in {place} are {listed(names)}, those of {whose} {theirs}: they are matched by "
        "name, so pack a set of these classes only, in class folders of these names"
    )


def class_names_in(record: Any) -> ClassNames | None:
    """Return the names in a JSON value; None if it holds none, as of versions without names."""
    if isinstance(record, list) and all(isinstance(name, str) for name in record):
        return tuple(record)
    return None


def listed(names: Sequence[str]) -> str:
    """Number the names, as in `0 cat, 1 dog`; of many, the first."""
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_LISTED]))
    return shown + (f", … ({len(names)} in all)" if len(names) > _LISTED else "")
