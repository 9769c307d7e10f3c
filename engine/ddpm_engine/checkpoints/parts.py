"""The tensors of a checkpoint: one part is a folder of safetensors files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.hidden_files import is_hidden

Part = Mapping[str, Tensor]


def write_part(path: Path, tensors: Part, group: dist.ProcessGroup | None) -> None:
    """Write the tensors of one part into an existing folder; all ranks of a group call it together.

    Raises:
        OSError: it could not be written.
    """
    # safetensors takes only contiguous tensors; channels-last weights are copied.
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with _quiet():
            dcp.save(contiguous, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        # The errors of all ranks with their tracebacks; to the caller a full disk is an OSError.
        reasons = {str(failure[0]) for failure in error.failures.values()}
        raise OSError(f"writing {path} failed: {'; '.join(sorted(reasons))}") from error
    except SafetensorError as error:
        raise OSError(f"writing {path} failed: {error}") from error


def load_part(path: Path, name: str, target: Part) -> None:
    """Fill the tensors of `target`, in place, from one part of a verified checkpoint.

    Whoever uses them checks that they are finite, on several ranks once all parts are loaded.

    Raises:
        UserError: the part is missing, has other names or shapes, or its files are not what this
            engine writes.
    """
    if not (path / name).is_dir():
        raise UserError(f"{path} holds no part {name!r}")
    reader = _Reader(str(path / name))
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


class _Reader(HuggingFaceStorageReader):
    """Torch's reader of all safetensors files in a folder, but for hidden ones."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fs = _Visible()


class _Visible(FileSystem):
    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [file for file in super().ls(path) if not is_hidden(os.path.basename(file))]


def check_finite(name: str, tensors: Part) -> None:
    """Check that tensors, of DTensors this rank's shards, hold neither NaN nor infinity.

    Args:
        name: what they are, for the message.
        tensors: by name.

    Raises:
        NotFiniteError: naming one that does.
    """
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not bool(torch.isfinite(local).all()):
            raise NotFiniteError(
                f"{name} is not finite: its tensor {key} holds NaN or infinity, from a training "
                "that failed"
            )


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read, though its hashes agree ({type(error).__name__}: {error}); it was "
        "not written by this engine: choose another checkpoint"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that one process is not a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
