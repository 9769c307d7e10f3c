"""What a run on a GPU consists of: items that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Value = str | float | int | bool | None
Row = Mapping[str, Value]
"""One result: what was measured or checked, by name of the column."""


class NotHereError(Exception):
    """What an item is about does not exist in this build, or on this machine."""


class FailedError(Exception):
    """A check did not hold."""


@dataclass(frozen=True)
class Item:
    """One measurement or check, run in a process of its own."""

    name: str
    """Unique, and short: it begins every line that the item prints."""
    section: str
    """Title of the table that its rows stand in."""
    function: str
    """`MODULE.FUNCTION` of `benchmarks.gpu.items`, called with a `Context` and `options`; by name,
    so that a package that is missing fails the items that need it and no others."""
    estimate: float
    """Seconds that it is expected to take on a GPU, its start among them."""
    limit: float
    """Seconds after which its processes are killed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    together: str | None = None
    """Neighbours of equal, given names run at the same time; without a name an item runs alone."""


@dataclass(frozen=True)
class Context:
    """What an item is given."""

    device: torch.device
    dry: bool
    """Rehearse: the same code at a size that a CPU does in seconds. Times mean nothing."""
    out: Path
    """Folder of the results."""
    scratch: Path
    """Folder of this item alone, removed when it has ended well."""
    shared: Path
    """Folder that lasts, for what several items make and use."""
    add: Callable[[Row], None]
    """Keeps a row, at once."""
    rows: Callable[[str], list[Row]]
    """Rows that an earlier item, by its name, has kept."""
