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
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from ddpm_engine.atomic_io import atomic_write, fsync_directory, sha256_of
from ddpm_engine.config import RunConfig, from_dict
from ddpm_engine.distributed import is_main, raise_together
from ddpm_engine.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SNAPSHOTS = "snapshots"
"""Folder of a run, beside `checkpoints`, that holds only the power-function averages, as
checkpoints of many steps that are never pruned."""
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
"""A larger manifest is not read: it cannot be one."""
_NAME = re.compile(r"step-(\d+)")

Part = Mapping[str, Tensor]


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
        return from_dict(self.state["config"], f"the configuration in {self.path}")


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
        self._group = group

    def steps(self) -> list[int]:
        """Steps of all checkpoints that have their final name, oldest first; none is opened."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

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
            OSError: the checkpoint could not be written. Nothing of it is left, and older ones are
                untouched. Raised on every rank.
        """
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            with raise_together(OSError, self._group):
                if is_main():
                    self._remove_leftovers()  # first: they may be what fills the disk
                    for name in parts:
                        (temporary / name).mkdir(parents=True)
            with raise_together(OSError, self._group):
                for name, tensors in parts.items():
                    _write_part(temporary / name, tensors, self._group)
            with raise_together(OSError, self._group):
                if is_main():
                    _write_manifest(temporary, step, state)
                    if final.exists():  # a damaged one, rejected when loading
                        self.remove(step)
                    os.replace(temporary, final)
                    fsync_directory(self.directory)
        except OSError:
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if is_main():
            try:
                for old in self.prunable(newest=step):
                    self.remove(old)
            except OSError as error:
                logger.warning("could not remove an old checkpoint: %s", error)

    def newest(self, parts: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest sound checkpoint; all ranks call this together, and rank 0 looks.

        Args:
            parts: as in `verify`.

        Returns:
            The checkpoint, or None if none is sound, and what is wrong with each newer one.
        """
        answer: list[Any] = [None, []]
        if is_main():
            for step in reversed(self.steps()):
                checkpoint, problems = verify(self.path(step), parts)
                if checkpoint is not None:
                    answer[0] = checkpoint
                    break
                answer[1].append(f"{self.path(step)}: {'; '.join(problems)}")
        if dist.is_initialized():
            dist.broadcast_object_list(answer)
        return answer[0], answer[1]

    def prunable(self, newest: int) -> list[int]:
        """Steps that are neither among the newest nor at a multiple of `keep_every`.

        Args:
            newest: step to count from; it and all steps beyond it are kept.
        """
        steps = [step for step in self.steps() if step <= newest]
        return [
            step for step in steps[: -self.keep] if not self.keep_every or step % self.keep_every
        ]

    def remove(self, step: int) -> None:
        """Delete a checkpoint; it is renamed first, so that none is ever half deleted.

        Raises:
            OSError: it cannot be deleted.
        """
        path = self.path(step)
        doomed = path.with_name(path.name + ".old.tmp")
        os.replace(path, doomed)
        shutil.rmtree(doomed)

    def leftovers(self) -> list[Path]:
        """Folders of saves and deletions that were interrupted or are in progress."""
        return sorted(self.directory.glob("step-*.tmp"))

    def _remove_leftovers(self) -> None:
        for leftover in self.leftovers():
            shutil.rmtree(leftover)


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
    present = (file.relative_to(path).as_posix() for file in sorted(path.glob("*/*.safetensors")))
    problems = [
        f"{name} is not in its manifest"
        for name in present
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


def load_part(path: Path, name: str, target: Part) -> None:
    """Fill the tensors of `target`, in place, from one part of a verified checkpoint.

    Raises:
        UserError: the part is missing, has other names or shapes, or its files are not what this
            engine writes.
    """
    if not (path / name).is_dir():
        raise UserError(f"{path} holds no part {name!r}")
    reader = HuggingFaceStorageReader(str(path / name))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, LookupError, TypeError, OSError) as error:
        raise _unreadable(path / name, error) from error
    differences = [f"{key} is missing" for key in target.keys() - stored.keys()]
    differences += [f"{key} is unexpected" for key in stored.keys() - target.keys()]
    differences += [
        f"{key} has shape {tuple(stored[key].size)}, not {tuple(target[key].shape)}"  # type: ignore[union-attr]
        for key in target.keys() & stored.keys()
        if tuple(stored[key].size) != tuple(target[key].shape)  # type: ignore[union-attr]
    ]
    if differences:
        shown = "\n       ".join(sorted(differences)[:5])
        raise UserError(
            f"{path / name} holds another architecture ({len(differences)} tensors differ):\n"
            f"       {shown}\n       use the configuration that it was trained with"
        )
    try:
        with _quiet():
            dcp.load(dict(target), storage_reader=reader)
    except (CheckpointException, SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(path / name, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read, though its hashes agree ({type(error).__name__}: {error}); it was "
        "not written by this engine: choose another checkpoint"
    )


def _write_part(path: Path, tensors: Part, group: dist.ProcessGroup | None) -> None:
    # safetensors takes only contiguous tensors; channels-last weights are copied.
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with _quiet():
            dcp.save(contiguous, storage_writer=writer, process_group=group)
    except (CheckpointException, SafetensorError) as error:
        # torch wraps the error of each rank; a full disk is an OSError to the caller either way.
        raise OSError(f"writing {path} failed: {error}") from error


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
    manifest["hash"] = _hash(manifest)
    with atomic_write(path / MANIFEST) as file_handle:
        file_handle.write(json.dumps(manifest, indent=2).encode())


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that one process is not a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
