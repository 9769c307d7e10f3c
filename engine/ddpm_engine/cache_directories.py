"""Where the engine keeps files that it can make or download again."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ddpm_engine.errors import UserError

_LIBRARIES = {
    "XDG_CACHE_HOME": "home", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib",
}  # fmt: skip
"""Environment variables of libraries that keep something in the home directory, and the folders
they get where there is none."""


def user_cache(name: str) -> Path:
    """Return the folder of one cache that a user shares among machines, which may not exist yet.

    It is `$XDG_CACHE_HOME/ddpm-engine/<name>`, by default under `~/.cache`; and of a user without a
    home directory, or with one that cannot be written, `node_cache`.

    Raises:
        UserError: there is no such folder either.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    base = Path(given) if given else _home_cache()
    if base is not None and may_be_written(base / "ddpm-engine" / name):
        return base / "ddpm-engine" / name
    try:
        return node_cache(name)
    except OSError as error:
        raise UserError(
            f"there is no place for the cache {name}: there is no home directory to write to, and "
            f"{error}; set XDG_CACHE_HOME to a folder"
        ) from error


def may_be_written(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is missing."""
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def provide_for_no_home() -> None:
    """Give libraries a folder for their caches, where the user has no home to keep them in.

    Call it before they are imported. Variables that are set stay as they are.
    """
    home = _home_cache()
    if home is not None and may_be_written(home):
        return
    for variable, name in _LIBRARIES.items():
        if variable not in os.environ:
            with suppress(OSError):  # they warn themselves
                folder = node_cache(name)
                folder.mkdir(exist_ok=True)
                os.environ[variable] = str(folder)


def _home_cache() -> Path | None:
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user that the system does not know
        return None


def node_cache(name: str) -> Path:
    """Return the folder of one cache on this node's local disk, which may not exist yet.

    It is `ddpm-engine-<user id>/<name>` under the temporary directory, which everybody may write
    to. So the folder that holds all caches is made here, private, and refused unless it is this
    user's and closed to others: a cache's content is trusted, compiled code is even executed.

    Raises:
        OSError: the folder belongs to someone else or is open to others, or there is no temporary
            directory.
    """
    folder = Path(tempfile.gettempdir()) / f"ddpm-engine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to someone else or is open to others")
    return folder / name
