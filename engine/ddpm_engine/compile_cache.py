"""Where compiled code is kept between runs: on this machine, not in a home that nodes share."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Environment variables of the compilers, and the folders they get."""


def use_local_compile_cache() -> None:
    """Point Triton and inductor at a folder of this user under the temporary directory.

    Triton's own default is the home directory, which on a cluster is a network file system that
    every rank of every node would write to. Variables that are set stay as they are. Compiled code
    is executed when it is found, so a folder that others may write to is not used.
    """
    if not hasattr(os, "getuid"):  # a system without Triton
        return
    folder = Path(tempfile.gettempdir()) / f"ddpm-engine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        logger.warning(
            "%s belongs to someone else or is open to others: compiled code is kept where the "
            "compilers keep it by default. Remove the folder, or set %s",
            folder,
            " and ".join(CACHES),
        )
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
