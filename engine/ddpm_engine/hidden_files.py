"""What systems and programs leave in folders without being asked: no listing takes it for data."""

from __future__ import annotations

_COMPANIONS = frozenset({
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "__macosx", "icon\r", "@eadir", "lost+found",
})  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether nobody put a file of this name there: `.DS_Store`, `._0.png`, `Thumbs.db`, ..."""
    return name.startswith(".") or name.lower() in _COMPANIONS
