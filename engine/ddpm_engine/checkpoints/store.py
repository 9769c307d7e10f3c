"""Checkpoints that are complete or absent.

    checkpoints/step-00002000/
        manifest.json                     written last: step, state, size and hash of every file
        model/*.safetensors               weights
        ema/*.safetensors                 their exponential moving average
        ema-0.05/*.safetensors            their power-function averages, if any are kept
        optimizer/*.safetensors           moments and step counts
        objective/*.safetensors           what the objective has learned, if it learns anything

Everything is written into `step-….tmp` beside it, fsynced and renamed. Tensors go through
torch.distributed.checkpoint: every rank writes its own shard, and any number of ranks can load
them. The formats are safetensors and JSON, so loading a stranger's checkpoint runs no code of
theirs.

No state that is not finite is saved. A finite one may still be that of a training that has failed:
if the steps before it were skipped because their gradients were not finite (`bad_steps` of its
state), it is saved, but nothing is pruned for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from ddpm_engine.atomic_io import atomic_write, discard, fsync_directory, sha256_of, unused_name
from ddpm_engine.checkpoints.parts import Part, check_finite, write_part
from ddpm_engine.checkpoints.recorded_config import of_record
from ddpm_engine.config import RunConfig
from ddpm_engine.distributed import is_main, of_main, raise_together
from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.json_files import to_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SET_ASIDE = ".aside"
"""Ends the names of checkpoints that are no longer used."""
SNAPSHOTS = "snapshots"
"""Folder of a run, beside `checkpoints`, that holds only the power-function averages, as
checkpoints of many steps that are never pruned."""
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
"""A larger manifest is not read: it cannot be one."""
_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-\d+(\.\w+)*\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that `verify` or `check_sizes` has found sound."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """JSON values that were given to `save`."""
    hash: str
    """SHA-256 of the manifest, which identifies the content: 64 hexadecimal digits."""

    @property
    def config(self) -> RunConfig:
        """Configuration of the run that saved it.

        Raises:
            UserError: there is none, or this version cannot read it.
        """
        if "config" not in self.state:
            raise UserError(f"{self.path} does not record the configuration of its run")
        origin = f"the configuration in {self.path}"
        return of_record(self.state["config"], self.path.parent.parent, origin)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: folder with one folder per checkpoint.
        keep: number of the newest checkpoints to keep, at least two.
        keep_every: checkpoints at multiples of this many steps are never pruned; None: none are.
        group: process group of all ranks to save over; None: the default group.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        keep_every: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.directory = directory
        self.keep = max(keep, 2)
        self.keep_every = keep_every
        self.protected: set[int] = set()
        """Steps of further checkpoints that are never pruned."""
        self._group = group

    def steps(self) -> list[int]:
        """Steps of all checkpoints that have their final name, oldest first; none is opened."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(name[1])
            for entry in self.directory.iterdir()
            if (name := _NAME.fullmatch(entry.name)) and entry.is_dir()
        )

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step, whether or not it exists."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any]) -> None:
        """Write a checkpoint and prune old ones; all ranks call this together.

        Args:
            step: optimizer steps done.
            parts: tensors, by part and name.
            state: JSON values, the same on every rank.

        Raises:
            NotFiniteError: a tensor holds NaN or infinity. Raised on every rank.
            OSError: the checkpoint could not be written. Nothing of it is left, and older ones are
                untouched. Raised on every rank.
        """
        with raise_together(NotFiniteError, self._group):
            for name, tensors in parts.items():
                check_finite(f"part {name} of step {step}", tensors)
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            with raise_together(OSError, self._group):
                if is_main():
                    for leftover in self.leftovers():  # first: they may be what fills the disk
                        discard(leftover)
                    temporary = unused_name(temporary)
                    for name in parts:
                        (temporary / name).mkdir(parents=True)
            temporary = of_main(temporary, self._group)
            with raise_together(OSError, self._group):
                for name, tensors in parts.items():
                    write_part(temporary / name, tensors, self._group)
            with raise_together(OSError, self._group):
                if is_main():
                    _write_manifest(temporary, step, state)
                    self._make_way(final)
                    os.replace(temporary, final)
                    fsync_directory(self.directory)
        except OSError:
            if is_main():
                discard(temporary)
            raise
        if is_main():
            try:
                for old in self.prunable(newest=step):
                    self.remove(old)
            except OSError as error:
                logger.warning("could not remove an old checkpoint: %s", error)

    def newest(
        self, parts: Collection[str] | None = None, below: int | None = None
    ) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest sound checkpoint; all ranks call this together, and rank 0 looks.

        Args:
            parts: as in `verify`.
            below: only of earlier steps than this; None: of all.

        Returns:
            The checkpoint, or None if none is sound, and what is wrong with each newer one.
        """
        found: Checkpoint | None = None
        rejected: list[str] = []
        if is_main():
            for step in reversed(self.steps()):
                if below is not None and step >= below:
                    continue
                found, problems = verify(self.path(step), parts)
                if found is not None:
                    break
                rejected.append(f"{self.path(step)}: {'; '.join(problems)}")
        return of_main((found, rejected))

    def newest_complete(self) -> Checkpoint | None:
        """Find the newest checkpoint whose files are there, on this rank, without reading them."""
        found = (check_sizes(self.path(step))[0] for step in reversed(self.steps()))
        return next(filter(None, found), None)

    def prunable(self, newest: int) -> list[int]:
        """Steps that are neither among the newest nor protected nor at a multiple of `keep_every`.

        Checkpoints that are not proven do not count among the newest.

        Args:
            newest: step to count from; it and all steps beyond it are kept.
        """
        steps = [step for step in self.steps() if step <= newest]
        kept = [step for step in steps if self._proven(step)][-self.keep :]
        return [
            step
            for step in steps
            if step not in (newest, *kept, *self.protected)
            and (not self.keep_every or step % self.keep_every)
        ]

    def remove(self, step: int) -> None:
        """Delete a checkpoint; it is renamed first, so that none is ever half deleted.

        Raises:
            OSError: it cannot be renamed.
        """
        _remove(self.path(step))

    def set_aside(self, since: int) -> list[Path]:
        """Rename the checkpoints of a step and all later ones, so that none is taken for sound.

        Returns:
            Their new paths.

        Raises:
            OSError: one cannot be renamed.
        """
        aside = []
        for step in self.steps():
            if step >= since:
                path = self.path(step)
                aside.append(unused_name(path.with_name(path.name + SET_ASIDE)))
                os.replace(path, aside[-1])
        return aside

    def leftovers(self) -> list[Path]:
        """Folders of saves and deletions that were interrupted or are in progress."""
        if not self.directory.is_dir():
            return []
        return sorted(
            entry
            for entry in self.directory.iterdir()
            if _LEFTOVER.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
        )

    def _proven(self, step: int) -> bool:
        try:
            manifest = _read_manifest(self.path(step))
        except (OSError, _BadManifest):
            return True  # counted like any other, as long as it is not known to be worse
        return not manifest["state"].get("bad_steps")

    def _make_way(self, final: Path) -> None:
        """Remove a damaged checkpoint, rejected when loading; rename whatever else has its name."""
        if final.is_dir() and not final.is_symlink():
            _remove(final)
        elif os.path.lexists(final):
            aside = unused_name(final.with_name(final.name + SET_ASIDE))
            os.replace(final, aside)
            logger.warning("%s is no checkpoint, and is called %s from now on", final, aside)


def _remove(checkpoint: Path) -> None:
    doomed = unused_name(checkpoint.with_name(checkpoint.name + ".old.tmp"))
    os.replace(checkpoint, doomed)
    discard(doomed)


def verify(path: Path, parts: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Check a checkpoint's manifest, and read and hash the files of the parts that are needed.

    Nothing outside `path` is read, whatever the manifest and the files claim.

    Args:
        path: folder of the checkpoint.
        parts: names such as `ema`; other parts may be damaged or missing. None: all.

    Returns:
        The checkpoint and no problems, or None and everything that is wrong with it.
    """
    return _check(path, parts, hashes=True)


def check_sizes(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """As `verify`, but of the files check only that they exist and how large they are."""
    return _check(path, None, hashes=False)


def _check(
    path: Path, parts: Collection[str] | None, hashes: bool
) -> tuple[Checkpoint | None, list[str]]:
    try:
        manifest = _read_manifest(path)
        files = manifest["files"]
        if parts is not None:
            files = {name: entry for name, entry in files.items() if _part_of(name) in parts}
        problems = _layout_mismatches(path, files, parts)
        if hashes and not problems:
            problems = _hash_mismatches(path, files)
    except OSError as error:
        return None, [f"it cannot be read ({error})"]
    except (_BadManifest, ValueError) as error:  # ValueError: a name with a zero byte
        return None, [str(error)]
    if problems:
        return None, problems
    return Checkpoint(path, manifest["step"], manifest["state"], _hash(manifest)), []


def _part_of(name: str) -> str:
    """The part that a file of a manifest claims to belong to."""
    return PurePosixPath(name).parts[0] if name else ""


class _BadManifest(Exception):
    """A manifest that does not describe a checkpoint; the message says why."""


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest without its hash; `step`, `state` and `files` exist and have their types."""
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise _BadManifest("it has no manifest, so it was never finished")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise _BadManifest(f"its manifest has {file.stat().st_size} bytes, which none has")
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise _BadManifest(f"its manifest cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise _BadManifest("its manifest is not an object")
    if manifest.get("format") != FORMAT:
        raise _BadManifest(f"its format is {manifest.get('format')}; this version reads {FORMAT}")
    if manifest.pop("hash", None) != _hash(manifest):
        raise _BadManifest("its manifest does not match its own hash")
    for name, kind in {"step": int, "state": dict, "files": dict}.items():
        if type(manifest.get(name)) is not kind:
            raise _BadManifest(f"its manifest has no {name} of type {kind.__name__}")
    return manifest


def _layout_mismatches(
    path: Path, files: dict[str, Any], parts: Collection[str] | None
) -> list[str]:
    """Where the files of some parts are not those of the manifest, by name and size."""
    present = [file for file in sorted(path.glob("*/*.safetensors")) if not is_hidden(file.name)]
    problems = [
        f"{name} is not in its manifest"
        for name in (file.relative_to(path).as_posix() for file in present)
        if name not in files and (parts is None or _part_of(name) in parts)
    ]
    inside = path.resolve()
    for name, expected in files.items():
        file = path / name
        # A part and a file in it: no way up, and no way out through a link.
        if PurePosixPath(name).suffix != ".safetensors" or file.resolve().parent.parent != inside:
            problems.append(f"{name!r} is not the name of a file of a checkpoint")
        elif not isinstance(expected, dict):
            problems.append(f"{name} has no size and hash in its manifest")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected.get("bytes"):
            problems.append(f"{name} has {file.stat().st_size} bytes, not {expected.get('bytes')}")
    return problems


def _hash_mismatches(path: Path, files: dict[str, Any]) -> list[str]:
    """Files whose content is not that of the manifest; all of them are read."""
    return [
        f"{name} does not match its hash"
        for name, expected in files.items()
        if sha256_of(path / name) != expected.get("sha256")
    ]


def _write_manifest(path: Path, step: int, state: Mapping[str, Any]) -> None:
    files = {}
    for file in sorted(path.rglob("*.safetensors")):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        name = file.relative_to(path).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    for folder in {file.parent for file in path.rglob("*.safetensors")}:
        fsync_directory(folder)
    manifest = {"format": FORMAT, "step": step, "state": dict(state), "files": files}
    manifest = json.loads(to_json(manifest))  # as it will be read
    manifest["hash"] = _hash(manifest)
    with atomic_write(path / MANIFEST) as file_handle:
        file_handle.write(to_json(manifest, indent=2).encode())


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
