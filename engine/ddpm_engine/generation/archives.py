"""Reading NumPy's archives, whoever damaged them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DamagedArchiveError(ValueError):
    """A file is no archive of the arrays that it should hold."""


def read_arrays(path: Path, *names: str) -> tuple[NDArray[Any], ...]:
    """Read arrays of an archive; nothing in it is executed.

    Args:
        path: of the archive.
        names: of the arrays.

    Returns:
        The arrays in that order, `[...]` each, of whatever shape and type was stored.

    Raises:
        DamagedArchiveError: one cannot be read.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return tuple(archive[name] for name in names)
        except MemoryError:
            raise
        # Damage makes zipfile, zlib, struct and NumPy raise errors of their own.
        except Exception as error:
            raise DamagedArchiveError(f"damaged archive ({error})") from error
