"""How much memory this process can have, and refusing what cannot fit into it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ddpm_engine.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")
_MOST = 1 << 69  # larger numbers are typing errors, and too large to divide
_LIMITS = ("memory.max", "memory.limit_in_bytes")  # of cgroups' version 2 and 1


def memory_limit() -> int | None:
    """Return the bytes this process can have at most: the machine's memory, or its cgroup's limit.

    None where the system does not tell.
    """
    known = [limit for folder in _own_cgroups() for limit in _limits_in(folder)]
    with suppress(AttributeError, OSError, ValueError):  # names that this system does not have
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(known, default=None)


def check_fits(needed: int, name: str, remedy: str, limit: int | None = None) -> None:
    """Refuse a number that takes more memory than there is, before any is taken.

    Args:
        needed: bytes, a lower bound, so that nothing is refused that would work.
        name: of the field that asks for them.
        remedy: what to do, as in "choose a smaller one".
        limit: bytes there are; None: as `memory_limit` says.

    Raises:
        UserError: they do not fit.
    """
    limit = memory_limit() if limit is None else limit
    if limit is not None and needed > limit:
        raise UserError(
            f"`{name}` asks for at least {in_words(min(needed, _MOST))} of memory, and there are "
            f"{in_words(limit)}; {remedy}",
            name,
        )


def in_words(count: int) -> str:
    """Return a number of bytes as people read it, such as 3.2 GiB."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min((max(count, 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.3g} {units[power]}"


def _own_cgroups() -> set[Path]:
    """Return the folders of the cgroups of this process, and of those around them."""
    folders = {_CGROUPS, _CGROUPS / "memory"}
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUPS / ("memory" if controllers else "")
            own = root / path.lstrip("/")
            folders |= {own, *own.parents} if ".." not in own.parts else set()
    return {folder for folder in folders if folder.is_relative_to(_CGROUPS)}


def _limits_in(folder: Path) -> list[int]:
    limits = []
    for name in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((folder / name).read_text()))
    return limits
