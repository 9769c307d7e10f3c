"""Advisory locks on files, shared by several processes.

The operating system releases a lock when its owner ends, however it ends. There are two kinds of
owner, because forked children matter:

- a process (`inherit=False`, POSIX record locks): forked children do not hold the lock, and it can
  cover a range of bytes, even beyond the end of the file. Closing *any* descriptor of the file in
  the process releases the lock, and a process never conflicts with itself.
- an open file (`inherit=True`, `flock`): forked children share the lock, which ends when the last
  of them closes the file. It covers the whole file, and two openings conflict even in one process.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ddpm_engine.waiting import announced


class LocksUnsupportedError(OSError):
    """The file system has no locks of this kind; some network file systems do not."""


def acquire(
    file: BinaryIO | int,
    *,
    shared: bool = False,
    wait: bool = False,
    inherit: bool = False,
    start: int = 0,
    length: int = 0,
) -> bool:
    """Lock an open file.

    Args:
        file: file object or descriptor; open for writing unless `shared` or `inherit`.
        shared: other shared locks are allowed, exclusive ones are not.
        wait: block until the lock is granted.
        inherit: the open file owns the lock instead of the process; see the module.
        start: first byte of the range; only with `inherit=False`.
        length: bytes of the range; 0 reaches to the end, wherever that is.

    Returns:
        Whether the lock was granted; False if a conflicting lock exists and `wait` is False.

    Raises:
        LocksUnsupportedError: the file system has no locks.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        _apply(file, operation if wait else operation | fcntl.LOCK_NB, inherit, start, length)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise LocksUnsupportedError(error.errno, error.strerror) from error
    return True


def acquire_announced(file: BinaryIO | int, whom: str, **arguments: Any) -> None:
    """Wait for a lock that the open file owns, and say so if that takes a while.

    Args:
        file: as in `acquire`.
        whom: who may hold it, for "waiting for ...".
        arguments: further ones of `acquire`.

    Raises:
        LocksUnsupportedError: the file system has no locks.
    """
    arguments = {"inherit": True, **arguments}
    if not acquire(file, **arguments):
        with announced(f"waiting for {whom}"):
            acquire(file, wait=True, **arguments)


def release(
    file: BinaryIO | int, *, inherit: bool = False, start: int = 0, length: int = 0
) -> None:
    """Release what `acquire` locked with the same arguments; without effect if nothing is locked.

    Raises:
        LocksUnsupportedError: the file system has no locks.
    """
    try:
        _apply(file, fcntl.LOCK_UN, inherit, start, length)
    except OSError as error:
        raise LocksUnsupportedError(error.errno, error.strerror) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, created if missing, while the block runs; wait for it.

    Threads and processes exclude each other. Forked children that outlive the block do not hold it.

    Raises:
        LocksUnsupportedError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        acquire_announced(descriptor, f"another process that holds {path}")
        try:
            yield
        finally:
            release(descriptor, inherit=True)
    finally:
        os.close(descriptor)


def _apply(file: BinaryIO | int, operation: int, inherit: bool, start: int, length: int) -> None:
    if inherit:
        if start or length:
            raise ValueError("a lock that children inherit covers the whole file")
        fcntl.flock(file, operation)
    else:
        fcntl.lockf(file, operation, length, start)
