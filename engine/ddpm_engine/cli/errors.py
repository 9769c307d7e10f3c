"""What a command says when it cannot go on: one line with what to do, and a status."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ddpm_engine.errors import UserError
from ddpm_engine.launched import is_first

REFUSED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit statuses: what the person can correct, Ctrl-C, and a reader of the output that has left."""

_ROOM = "make room there, and run the same command again"
_PERMISSION = "choose another place, or ask for permission"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "choose a file system that holds larger files",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "a file is where a folder should be; choose another place",
    errno.EISDIR: "a folder is where a file should be; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; choose another place",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
    errno.ENFILE: "close other programs, or allow more open files",
    errno.EIO: "the disk or the file system fails; choose another place",
    errno.ESTALE: "the file system has gone; wait for it, or choose another place",
    errno.ENOTCONN: "the file system has gone; wait for it, or choose another place",
}
_COMPILERS = ("Failed to find C compiler", "No working C++ compiler", "InvalidCxxCompiler")
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_LESS = "take smaller batches or images, fewer processes, or a machine with more"


def refuse(message: str) -> SystemExit:
    """Say what is wrong, once for all processes of a launcher, and return what ends the process."""
    if is_first():
        print(f"error: {message}", file=sys.stderr)
    # Not `sys.exit`: under a launcher every rank must leave with a non-zero status.
    return SystemExit(REFUSED)


@contextmanager
def exit_in_one_line(in_flags: Callable[[str], str] = str) -> Iterator[None]:
    """End the process with one line for whatever its user can correct, a traceback for a defect.

    That is a `UserError`; Ctrl-C; a full disk and other errors of a file system; memory that has
    run out; a package or a compiler that is missing. A reader of the output that has left, such
    as `head`, ends it silently.

    Args:
        in_flags: turns the fields in the message of a `UserError` into flags.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files need not be text in any encoding.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, UserError):
            raise refuse(in_flags(str(error))) from None
        chain = list(_chain(error))
        if any(isinstance(one, KeyboardInterrupt) for one in chain):
            say_interrupted()
            raise SystemExit(INTERRUPTED) from None
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            _discard_output()
            raise SystemExit(PIPE_CLOSED) from None
        said = next((found for one in chain if (found := explanation(one))), None)
        if said is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()  # or Python tries again as it ends
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(REFUSED) from None


def say_interrupted() -> None:
    """Answer Ctrl-C, once for all processes of a launcher."""
    if is_first():
        print("interrupted", file=sys.stderr, flush=True)


def explanation(error: BaseException) -> str | None:
    """What happened and what to do, of an error that is no defect of the engine; else None."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    is_memory = isinstance(error, RuntimeError) and any(part in text.lower() for part in _MEMORY)
    if is_memory or isinstance(error, MemoryError):
        size = re.search(r"allocate ([\d.]+ ?\w+)", text)
        asked = "" if size is None else f": {size[1]} could not be allocated"
        return f"memory has run out{asked}; {_LESS}"
    if kind in _COMPILERS or any(part in text for part in _COMPILERS):
        return (
            "a C and C++ compiler is needed to compile for this machine, and none was found; "
            "install gcc and g++, or name others in the variables CC and CXX, or leave "
            "compilation out"
        )
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if not package.startswith("ddpm_"):
            return f"the package {package} is missing; install it into {sys.prefix}"
    if isinstance(error, OSError):
        if error.errno in _REMEDIES:
            where = "" if error.filename is None else f"{error.filename}: "
            return f"{where}{error.strerror}; {_REMEDIES[error.errno]}"
        # Libraries raise errors of their own that only say it.
        if os.strerror(errno.ENOSPC) in text:
            return f"{text}; {_ROOM}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _discard_output() -> None:
    """Let whatever standard output still holds go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
