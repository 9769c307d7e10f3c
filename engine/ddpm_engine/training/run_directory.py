"""The directory of a run: created once, continued only by the same run."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, atomic_write
from ddpm_engine.checkpoints.recorded_config import CONFIG, load_record, record
from ddpm_engine.checkpoints.store import SNAPSHOTS, Checkpoint, CheckpointStore
from ddpm_engine.config import RunConfig, flatten
from ddpm_engine.data.classes import ClassNames, check_same_classes, class_names_in
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.json_files import parse_json, to_json
from ddpm_engine.locations import check_local
from ddpm_engine.locks import LocksUnsupportedError, acquire
from ddpm_engine.printable import check_utf8

logger = logging.getLogger(__name__)

_DATA = "data.json"
_LOCK = "lock"

# Fields that identify a run. All others may change between a stop and the next start.
_IDENTITY = (
    "model.", "diffusion.", "objective.", "training.init", "training.seed", "training.batch_size",
    "training.ema_decay", "training.ema_sigma_rel", "training.condition_dropout",
    "training.augmentation_levels",
    "data.horizontal_flip", "data.window_shards", "data.vector",
    "data.diffuse", "distillation.", "autoencoding.",
)  # fmt: skip
# How a network is computed, not which network it is.
_NOT_IDENTITY = ("model.attention",)


def check_run_directory(
    config: RunConfig, fingerprint: str | None = None, classes: ClassNames | None = None
) -> None:
    """Check that a run can have its directory: it holds nothing, or this run.

    Nothing is written, so that a start that fails later has claimed nothing. A run that has no step
    to protect yet, because its first start failed, may become another.

    Args:
        config: the run.
        fingerprint: fingerprint of its data; None: not known yet.
        classes: names of the classes of its data, if it is conditional.

    Raises:
        UserError: the directory belongs to another run or is not a run directory.
    """
    out = config.out
    check_local(out, "out")
    check_utf8(out, "out")
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise UserError(f"`out` {out} is a file; choose a folder", "out")
        newest = CheckpointStore(out / "checkpoints").newest_complete()
        if (out / CONFIG).exists():
            before, _ = load_record(out / CONFIG)
        elif newest is not None:
            logger.warning("%s is gone; it is written again from %s", out / CONFIG, newest.path)
            before = newest.config
        elif foreign := _foreign(out):
            raise UserError(
                f"`out` {out} exists and is not a run directory (it holds {foreign}); choose "
                "another",
                "out",
            )
        else:
            return
        if not (out / _DATA).exists() or _begun(out):
            _check_same_run(before, config)
            if fingerprint is not None:
                _check_same_data(out, newest, fingerprint, classes)
    except OSError as error:
        raise UserError(f"`out` {out} cannot be read: {error}", "out") from None


def claim_run_directory(
    config: RunConfig, fingerprint: str, classes: ClassNames | None = None
) -> BinaryIO:
    """Create the run directory and record the configuration, or check that it holds this run.

    Call it in one process of the run, once everything else that can fail has succeeded.

    Args:
        config: the run.
        fingerprint: fingerprint of its data.
        classes: names of its classes; None: it has none.

    Returns:
        The lock of the directory; see `lock_run_directory`.

    Raises:
        UserError: the directory belongs to another run or is not a run directory, cannot be
            written, or another process is training there.
    """
    out = config.out
    check_run_directory(config, fingerprint, classes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_run_directory(out)
        with atomic_write(out / CONFIG) as file:
            file.write((to_json(record(config), indent=2) + "\n").encode())
        with atomic_write(out / _DATA) as file:
            file.write(to_json({"fingerprint": fingerprint, "classes": classes}).encode())
    except OSError as error:
        raise UserError(f"`out` {out} cannot be written: {error}", "out") from None
    return lock


def is_run(directory: Path) -> bool:
    """Whether a run has claimed a directory."""
    return (directory / _DATA).exists() or bool(CheckpointStore(directory / "checkpoints").steps())


def begun_with(out: Path) -> RunConfig | None:
    """Read the configuration of the run in a directory, if that has a step to protect.

    Nothing is wrong with a directory that it returns None for, unless `check_run_directory` says
    so.
    """
    with suppress(OSError, UserError, ValueError):
        if _begun(out):
            if (out / CONFIG).exists():
                return load_record(out / CONFIG)[0]
            newest = CheckpointStore(out / "checkpoints").newest_complete()
            return None if newest is None else newest.config
    return None


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


def _foreign(out: Path) -> str | None:
    """An entry of a folder that an interrupted first start does not leave, if there is any."""
    names = (entry.name for entry in out.iterdir() if not is_hidden(entry.name))
    return min((n for n in names if not n.endswith(TEMPORARY_SUFFIX) and n != _LOCK), default=None)


def _begun(out: Path) -> bool:
    """Whether a run has anything to protect."""
    metrics = out / "metrics.jsonl"
    return (
        any(CheckpointStore(out / folder).steps() for folder in ("checkpoints", SNAPSHOTS))
        or (metrics.exists() and metrics.stat().st_size > 0)
        or any(out.glob("samples/*"))
    )


def _check_same_run(before: RunConfig, now: RunConfig) -> None:
    old, new = flatten(before), flatten(now)
    changed = {name: (old[name], new[name]) for name in new if _is_other(old[name], new[name])}
    identity: tuple[str, ...] = _IDENTITY
    if now.distillation.teacher is not None:
        # Its steps are divided into stages, and its targets are clipped or not.
        identity = (*_IDENTITY, "training.steps", "sampling.clip_x0")
    essential = {
        name: values
        for name, values in changed.items()
        if name.startswith(identity) and name not in _NOT_IDENTITY and not _has_moved(name, *values)
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


def _check_same_data(
    out: Path, newest: Checkpoint | None, fingerprint: str, classes: ClassNames | None
) -> None:
    before = _recorded_data(out, newest)
    recorded = before.get("fingerprint")
    if recorded not in (None, fingerprint):
        raise UserError(
            f"the run in {out} was trained on data with fingerprint {recorded[:12]}…, but "
            f"these shards have {fingerprint[:12]}…; give it the same shards, or choose another "
            "`out`"
        )
    names = class_names_in(before.get("classes"))
    check_same_classes(names, f"the run in {out}", classes, "its data")


def _recorded_data(out: Path, newest: Checkpoint | None) -> dict[str, Any]:
    """Fingerprint and class names of a run's data, as far as they are known."""
    with suppress(OSError, UserError):
        record = parse_json((out / _DATA).read_bytes(), str(out / _DATA))
        if isinstance(record, dict) and isinstance(record.get("fingerprint"), str):
            return record
    # Gone or damaged: every checkpoint has it, too.
    if newest is None:
        return {}
    return {"fingerprint": newest.state.get("data"), "classes": newest.state.get("classes")}


def _is_other(old: Any, new: Any) -> bool:
    """Whether a value has changed, and not only the way that a path is written."""
    if isinstance(old, Path) and isinstance(new, Path):
        return os.path.realpath(old) != os.path.realpath(new)
    return bool(old != new)


def _has_moved(name: str, old: Any, new: Any) -> bool:
    """Whether what a run was distilled or started from is where it is now said to be alone."""
    named = name in ("distillation.teacher", "distillation.student", "training.init")
    paths = isinstance(old, Path) and isinstance(new, Path)
    return named and paths and not old.exists() and new.exists()
