"""Where the engine keeps files that it can make or download again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return the folder of one cache that a user shares among machines, which may not exist yet.

    It is `$XDG_CACHE_HOME/ddpm-engine/<name>`, by default under `~/.cache`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ddpm-engine" / name


def node_cache(name: str) -> Path:
    """Return the folder of one cache on this node's local disk, which may not exist yet.

    It is `ddpm-engine-<user id>/<name>` under the temporary directory, which everybody may write
    to. So the folder that holds all caches is made here, private, and refused unless it is this
    user's and closed to others: a cache's content is trusted, compiled code is even executed.

    Raises:
        PermissionError: the folder belongs to someone else or is open to others.
    """
    folder = Path(tempfile.gettempdir()) / f"ddpm-engine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to someone else or is open to others")
    return folder / name
