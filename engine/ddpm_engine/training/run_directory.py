"""The directory of a run: created once, continued only by the same run."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any, BinaryIO

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, atomic_write
from ddpm_engine.config import RunConfig, dump_config, flatten, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.locks import LocksUnsupportedError, acquire
from ddpm_engine.printable import check_utf8

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_DATA = "data.json"
_LOCK = "lock"

# Fields that identify a run. All others may change between a stop and the next start.
_IDENTITY = (
    "model.", "diffusion.", "objective.", "training.seed", "training.batch_size",
    "training.ema_decay", "training.ema_sigma_rel", "training.label_dropout",
    "training.augmentation_levels",
    "data.horizontal_flip", "data.window_shards", "distillation.",
)  # fmt: skip
# How a network is computed, not which network it is.
_NOT_IDENTITY = ("model.attention",)


def claim_run_directory(config: RunConfig, fingerprint: str) -> BinaryIO:
    """Create the run directory and record the configuration, or check that it holds this run.

    Call it in one process of the run.

    Args:
        config: the run.
        fingerprint: fingerprint of its data.

    Returns:
        The lock of the directory; see `lock_run_directory`.

    Raises:
        UserError: the directory belongs to another run or is not a run directory, cannot be
            written, or another process is training there.
    """
    out = config.out
    check_utf8(out, "out")
    try:
        if (out / CONFIG).exists():
            _check_same_run(load_config(out), config)
            _check_same_data(out / _DATA, fingerprint)
        elif out.exists() and (not out.is_dir() or _holds_something(out)):
            raise UserError(
                f"`out` {out} exists and is not a run directory; choose another, or empty it", "out"
            )
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_run_directory(out)
        with atomic_write(out / CONFIG) as file:
            file.write(dump_config(config).encode())
        if not (out / _DATA).exists():
            with atomic_write(out / _DATA) as file:
                file.write(json.dumps({"fingerprint": fingerprint}).encode())
    except OSError as error:
        raise UserError(f"`out` {out} cannot be written: {error}", "out") from None
    return lock


def lock_run_directory(out: Path) -> BinaryIO:
    """Keep other processes from changing a run while this one does.

    Returns:
        A file that holds the lock until it is closed or the process ends.

    Raises:
        UserError: another process holds the lock; the message names it.
        OSError: the lock file cannot be written.
    """
    file = open(out / _LOCK, "a+b")  # noqa: SIM115
    try:
        # Owned by the process: workers that a fork leaves behind must not go on holding it.
        free = acquire(file)
    except LocksUnsupportedError as error:
        logger.warning("%s cannot be locked (%s): let only one process train there", out, error)
        return file
    if not free:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise UserError(
            f"{out} is in use by {holder or 'another process'}; wait until it has ended, or stop it"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    return file


def _holds_something(out: Path) -> bool:
    """Whether a folder holds anything but what an interrupted first start leaves."""
    return any(
        not entry.name.endswith(TEMPORARY_SUFFIX) and entry.name != _LOCK for entry in out.iterdir()
    )


def _check_same_run(before: RunConfig, now: RunConfig) -> None:
    old, new = flatten(before), flatten(now)
    changed = {name: (old[name], new[name]) for name in new if old[name] != new[name]}
    identity: tuple[str, ...] = _IDENTITY
    if now.distillation.teacher is not None:
        # Its steps are divided into stages, and its targets are clipped or not.
        identity = (*_IDENTITY, "training.steps", "sampling.clip_x0")
    essential = {
        name: values
        for name, values in changed.items()
        if name.startswith(identity) and name not in _NOT_IDENTITY
    }
    if essential:
        raise UserError(
            f"`out` {now.out} holds another run:\n       {_differences(essential)}\n"
            "       choose another `out`, or continue that run with the configuration in "
            f"{now.out / CONFIG}",
            "out",
        )
    changed.pop("out", None)
    if changed:
        logger.info("since the last start: %s", _differences(changed))


def _differences(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"`{name}` was {old} and is now {new}" for name, (old, new) in changed.items())


def _check_same_data(path: Path, fingerprint: str) -> None:
    try:
        recorded = json.loads(path.read_text())["fingerprint"]
    except (FileNotFoundError, ValueError, KeyError):
        return  # killed before it recorded its data: it has no steps to protect
    if recorded != fingerprint:
        raise UserError(
            f"the run in {path.parent} was trained on data with fingerprint {recorded[:12]}…, but "
            f"these shards have {fingerprint[:12]}…; give it the same shards, or choose another "
            "`out`"
        )
