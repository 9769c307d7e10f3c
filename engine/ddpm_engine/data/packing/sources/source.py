"""A source of images to be packed, and what its kinds have in common."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import Pixels
from ddpm_engine.images.damaged import unreadable


class Example(NamedTuple):
    """One image of a source."""

    key: str
    """What the source calls it; named in error messages."""
    image: Pixels
    """uint8 `[H, W, C]`."""
    label: int | None
    """Class from 0, or None."""
    captions: tuple[str, ...] = ()
    """Captions, each on one line; all examples of a source have some, or none has."""


class DamagedImage(UserError):
    """One image of a source cannot be read.

    Args:
        name: of the image.
        reason: why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(str(unreadable({name: reason})))
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[DamagedImage], tuple[str, str]]:
        return DamagedImage, (self.name, self.reason)


class LazyExamples(Sequence[Example]):
    """Examples that are loaded on access, every time anew.

    Args:
        places: arguments of `load`, in order.
        load: returns the example at a place.
    """

    def __init__(self, places: range, load: Callable[[int], Example]) -> None:
        self._places = places
        self._load = load

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> LazyExamples: ...
    def __getitem__(self, place: int | slice) -> Example | LazyExamples:
        if isinstance(place, slice):
            return LazyExamples(self._places[place], self._load)
        return self._load(self._places[place])


@dataclass(frozen=True)
class Source:
    """Images to be packed."""

    name: str
    """As the user wrote it."""
    examples: Sequence[Example]
    """The images in order, each accessible without the ones before it."""
    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ..., where the source knows them."""
    revision: str | None = None
    """Equal for equal images: an interrupted run continues only on the revision that it began with.
    None: not known."""


def array_source(
    name: str,
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[Any] | None,
    classes: tuple[str, ...] | None,
    revision: str,
) -> Source:
    """Return a source over uint8 `[N, H, W, C]` and integers `[N]`."""

    def load(number: int) -> Example:
        label = None if labels is None else int(labels[number])
        return Example(f"{number:08d}", images[number], label)

    return Source(name, LazyExamples(range(len(images)), load), classes, revision)


def revision_of(files: Iterable[Path]) -> str:
    """Return a hash of the files' names, sizes and modification times."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file):
            status = file.stat()
        described = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(described.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in every error of reading it.

    Raises:
        UserError: in place of the error.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot read {path}: {error}; it may be damaged") from error
