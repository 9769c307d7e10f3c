"""The file of results: lines of JSON, appended as they come, each safe before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.item import Row

Status = Literal["done", "failed", "killed", "skipped", "not here"]
"""How an item ended. `killed`: it passed its limit; `skipped`: it no longer fitted the budget."""


@dataclass(frozen=True)
class End:
    """How one attempt at an item ended."""

    item: str
    attempt: int
    status: Status
    seconds: float
    message: str


class Results:
    """`results.jsonl` of a folder.

    Several processes append to it at once: a line is one write to a file opened for appending.

    Args:
        folder: made if missing.
        dry: whether the results are those of a rehearsal; those of the other kind are passed over.
    """

    def __init__(self, folder: Path, dry: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.dry = dry

    def append(self, **entry: Any) -> None:
        """Write one line and see it on the disk."""
        line = json.dumps({"dry": self.dry, **entry}, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # A process that was killed may have left half a line.
            size = os.fstat(descriptor).st_size
            whole = size == 0 or self._last_byte(size) == b"\n"
            os.write(descriptor, (line if whole else "\n" + line).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _last_byte(self, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1)

    def begin(self, item: str, attempt: int) -> None:
        """Keep that an attempt began: one without an end was interrupted."""
        self.append(item=item, attempt=attempt, begun=True)

    def add_row(self, item: str, attempt: int, row: Row) -> None:
        """Keep one result of an item."""
        self.append(item=item, attempt=attempt, row=dict(row))

    def end(self, end: End) -> None:
        """Keep how an attempt ended."""
        self.append(
            item=end.item, attempt=end.attempt, status=end.status,
            seconds=round(end.seconds, 2), message=end.message,
        )  # fmt: skip

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of this kind; one that a kill has torn is passed over."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("dry", False) == self.dry:
                yield entry

    def machines(self) -> list[dict[str, str]]:
        """Facts of the machine, once for each start."""
        return [entry["machine"] for entry in self.entries() if "machine" in entry]

    def ends(self) -> dict[str, End]:
        """Return how the last attempt at each item ended, where it did."""
        return {
            entry["item"]: End(
                entry["item"], entry["attempt"], entry["status"], entry["seconds"], entry["message"]
            )
            for entry in self.entries()
            if "status" in entry
        }

    def attempts(self) -> dict[str, int]:
        """Return the attempts that each item has begun; one that was skipped has begun none."""
        begun: dict[str, int] = {}
        for entry in self.entries():
            if "item" in entry and entry.get("status") != "skipped":
                begun[entry["item"]] = max(begun.get(entry["item"], 0), entry["attempt"])
        return begun

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of each item's last attempt that left any."""
        found: dict[str, tuple[int, list[Row]]] = {}
        for entry in self.entries():
            if "row" in entry:
                attempt, rows = found.get(entry["item"], (0, []))
                if entry["attempt"] > attempt:
                    attempt, rows = entry["attempt"], []
                found[entry["item"]] = (attempt, [*rows, entry["row"]])
        return {item: rows for item, (_, rows) in found.items()}
