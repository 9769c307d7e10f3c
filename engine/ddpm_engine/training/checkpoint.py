"""Checkpoints that are whole or not there.

    checkpoints/step-00002000/
        manifest.json                     written last: step, state, size and hash of every file
        model/*.safetensors               the weights
        ema/*.safetensors                 their moving average
        optimizer/*.safetensors           moments and step counts

Everything is written into `step-….tmp` beside it, fsynced and renamed. Tensors go through
torch.distributed.checkpoint, every rank its own part, and load on any number of ranks; they are
safetensors and JSON, so that loading a stranger's checkpoint runs none of their code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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

from ddpm_engine.errors import UserError
from ddpm_engine.files import atomic_write, fsync_directory, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)")

Part = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and files have been verified."""

    path: Path
    step: int
    state: dict[str, Any]
    """Whatever JSON values were given to `save`."""
    hash: str
    """Identifies the content: 64 hexadecimal digits."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds one folder a checkpoint.
        keep: how many of the newest to keep, at least two.
        keep_every: those at multiples of this many steps are kept for good.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_every: int | None = None) -> None:
        self.directory = directory
        self.keep = max(keep, 2)
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Steps of all complete-looking checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any]) -> None:
        """Write a checkpoint and prune old ones; call it on every rank.

        Args:
            step: optimizer steps done.
            parts: the tensors, by part and name.
            state: JSON values, the same on every rank.

        Raises:
            OSError: the checkpoint could not be written; nothing of it is left, and those that
                were there before still are. Raised on every rank.
        """
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            with _agreed():
                if _is_main():
                    shutil.rmtree(temporary, ignore_errors=True)
                    for name in parts:
                        (temporary / name).mkdir(parents=True)
            with _agreed():
                for name, tensors in parts.items():
                    _write_part(temporary / name, tensors)
            with _agreed():
                if _is_main():
                    _write_manifest(temporary, step, state)
                    if final.exists():  # a damaged one that was rejected when loading
                        shutil.rmtree(final)
                    os.replace(temporary, final)
                    fsync_directory(self.directory)
                    self._prune(newest=step)
        except OSError:
            if _is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and why each newer one did not.

        Rank 0 decides and tells the others.
        """
        answer: list[Any] = [None, []]
        if _is_main():
            for step in reversed(self.steps()):
                checkpoint, problems = verify(self.path(step))
                if checkpoint is not None:
                    answer[0] = checkpoint
                    break
                answer[1].append(f"{self.path(step)}: {'; '.join(problems)}")
        if dist.is_initialized():
            dist.broadcast_object_list(answer)
        return answer[0], answer[1]

    def _prune(self, newest: int) -> None:
        """Remove what is neither among the newest nor at a multiple of `keep_every`."""
        for leftover in self.directory.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                shutil.rmtree(self.path(step))


def verify(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """Check a checkpoint's manifest and every file it lists, reading all of them.

    Returns:
        The checkpoint and no problems, or None and everything that is wrong with it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        claimed = manifest.pop("hash")
        state, step, files = manifest["state"], manifest["step"], manifest["files"]
    except FileNotFoundError:
        return None, ["it has no manifest, so it was never finished"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return None, [f"its manifest cannot be read ({type(error).__name__}: {error})"]
    if manifest.get("format") != FORMAT:
        return None, [f"its format is {manifest.get('format')}; this version reads {FORMAT}"]
    if claimed != _hash(manifest):
        return None, ["its manifest does not match its own hash"]
    problems = []
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}")
        elif sha256_of(file) != expected["sha256"]:
            problems.append(f"{name} does not match its hash")
    if problems:
        return None, problems
    return Checkpoint(path, step, state, claimed), []


def load_part(path: Path, name: str, target: Part) -> None:
    """Fill the tensors of `target`, in place, from one part of a verified checkpoint.

    Raises:
        UserError: the part has not exactly these names and shapes.
    """
    reader = HuggingFaceStorageReader(str(path / name))
    stored = reader.read_metadata().state_dict_metadata
    differences = [f"{key} is missing" for key in target.keys() - stored.keys()]
    differences += [f"{key} is not wanted" for key in stored.keys() - target.keys()]
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
    with _quiet():
        dcp.load(dict(target), storage_reader=reader)


def _write_part(path: Path, tensors: Part) -> None:
    # safetensors takes only contiguous tensors; channels-last weights are copied.
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with _quiet():
            dcp.save(contiguous, storage_writer=writer)
    except (CheckpointException, SafetensorError) as error:
        # torch wraps what each rank met; to the caller a full disk is an OSError either way.
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


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _agreed() -> Iterator[None]:
    """If the block fails with an OSError on any rank, raise one on every rank."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if dist.is_initialized():
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if failure is None else str(failure))
        if failure is None and any(messages):
            failure = OSError("; ".join(message for message in messages if message))
    if failure is not None:
        raise failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is not a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
