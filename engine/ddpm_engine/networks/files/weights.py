"""Weight files: safetensors, sharded safetensors, and pickles of which only tensors are taken."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import read_part

SAFETENSORS = "diffusion_pytorch_model.safetensors"
_INDEX = SAFETENSORS + ".index.json"
_PICKLE = "diffusion_pytorch_model.bin"


@dataclass(frozen=True)
class Weights:
    """The content of a model's weight files."""

    tensors: dict[str, Tensor]
    """By name, on the CPU, as stored."""
    hash: str
    """sha256 of the file; of shards, that of their names and hashes."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What a safetensors file says of itself."""


def read_weights(folder: Path) -> Weights:
    """Read the weights that diffusers saved in a folder, safetensors if there are any.

    Raises:
        UserError: no weight file, or a damaged one.
    """
    if (folder / SAFETENSORS).exists():
        return _read_safetensors(folder / SAFETENSORS)
    if (folder / _INDEX).exists():
        return _read_shards(folder / _INDEX)
    if (folder / _PICKLE).exists():
        return read_pickle(folder / _PICKLE)
    raise UserError(
        f"there are no weights in {folder}: it needs {SAFETENSORS}, {_INDEX} with its shards, or "
        f"{_PICKLE}; download or save the whole model again"
    )


def read_pickle(file: Path) -> Weights:
    """Read a `torch.save`d state dict, refusing to execute anything.

    Raises:
        UserError: the file is damaged, or would run code, or holds something else.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    # A damaged file fails anywhere in torch's reader, with whatever that line happens to raise.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is damaged, or holds more than tensors and would execute code if it were "
            f"unpickled freely, which this engine never does ({reason}); download it again, or "
            "have it converted to safetensors by someone who trusts it"
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items()
    ):
        raise UserError(f"{file} is not a state dict, tensors by name: save model.state_dict()")
    return Weights(dict(values), sha256_of(file))


def write_weights(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, and wait until they are on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    # safetensors takes only contiguous tensors; ours are channels-last.
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, file, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def fill(model: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Copy tensors into a model's parameters, which keep their precision.

    Raises:
        UserError: the tensors have not exactly the model's names and shapes.
    """
    wanted = model.state_dict()
    differences = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    differences += [f"{name} is not wanted" for name in tensors.keys() - wanted.keys()]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    differences += [
        f"{name} is {tensors[name].dtype}, not floating point"
        for name in wanted.keys() & tensors.keys()
        if not tensors[name].is_floating_point()
    ]
    if differences:
        shown = "\n       ".join(sorted(differences)[:5])
        raise UserError(
            f"the weights in {origin} are not of the network that its configuration describes "
            f"({len(differences)} tensors differ):\n       {shown}\n"
            "       download or save both again"
        )
    model.load_state_dict(dict(tensors))


def _read_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        return Weights(tensors, sha256_of(file), metadata)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; download or save the whole model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); download or save it again") from None


def _read_shards(index: Path) -> Weights:
    weight_map = read_part(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise UserError(f"{index} has no weight_map of files beside it; download it again")
    tensors: dict[str, Tensor] = {}
    hashes = {}
    for name in sorted(set(weight_map.values())):
        shard = _read_safetensors(index.parent / name)
        tensors |= shard.tensors
        hashes[name] = shard.hash
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return Weights(tensors, digest)
