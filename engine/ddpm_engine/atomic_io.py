"""Writing files so that a crash, a full disk or a second reader never meets half of one."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ddpm_engine.locks import LocksUnsupportedError, locked

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for binary writing; it appears complete when the block ends, or not at all.

    The bytes go to `<path>.tmp` beside it, which is fsynced and renamed over `path`; then the
    folder is fsynced. On an error the temporary is removed and whatever `path` held before stays.
    Only one process may write one path at a time. A `<path>.tmp` that an interrupted write left is
    replaced; if it is a folder, or cannot be replaced, the temporary gets another name.

    Raises:
        OSError: as the operating system reports it (no space left, permission denied, ...).
    """
    target = _file_at(path)
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    # Never opened as it is: it might be read-only, or a link to a file elsewhere.
    with suppress(OSError):
        temporary.unlink()
    temporary = unused_name(temporary)
    # Closed by hand: closing flushes, so on a full disk it can fail a second time.
    file = open(temporary, "xb")  # noqa: SIM115
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(target.parent)


def write_once(path: str | os.PathLike[str], content: bytes) -> None:
    """Make a file, complete, unless there is one of that name: of several processes, one succeeds.

    On a file system without hard links (exFAT, SMB, object stores), processes exclude each other by
    the lock of `.<path>.lock` beside it, which stays. Where there are no locks either, only one
    process may write one path at a time.

    Raises:
        OSError: as the operating system reports it.
    """
    target = _file_at(path)
    # Of another name in each process, and linked, not renamed: that never replaces a file.
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            pass
        except OSError:
            # Each file system has its own way to say that it has no links. If something else is
            # wrong, renaming says so too.
            _rename_once(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()
    fsync_directory(target.parent)


def _rename_once(temporary: Path, target: Path) -> None:
    """Rename a file unless the target exists; processes that do so at once wait for each other."""
    try:
        with locked(target.with_name(f".{target.name}.lock")):
            if not target.exists():
                os.rename(temporary, target)
    except LocksUnsupportedError:
        if not target.exists():
            os.rename(temporary, target)


def unused_name(path: Path) -> Path:
    """Return `path`, or if that exists, a path beside it that does not: `step-5.1f….tmp`."""
    if not os.path.lexists(path):
        return path
    return path.with_name(f"{path.stem}.{uuid.uuid4().hex}{path.suffix}")


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder and all it holds.

    Cleaning up never fails the work that it is done for: whatever cannot be removed is left, with a
    warning.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # as far as it goes
            with suppress(FileNotFoundError):
                path.rmdir()  # for its error
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is left over and cannot be removed: %s", path, error)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable: files created, renamed or removed in it.

    Without effect on file systems that sync files only, as some network file systems do.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash a file's content: 64 hexadecimal digits, read in pieces of 1 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _file_at(path: str | os.PathLike[str]) -> Path:
    """The path, which must not be a folder: `.`, `..` and `/` have no name to write beside."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return target
