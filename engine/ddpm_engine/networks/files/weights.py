"""Weight files: safetensors, sharded safetensors, and pickles of which only tensors are taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, sha256_of
from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import listing, read_part
from ddpm_engine.networks.files.together import Writer

_STEM = "diffusion_pytorch_model"
SAFETENSORS = f"{_STEM}.safetensors"
_PRECISIONS = ("", ".fp16", ".bf16")
_NOT_AVERAGED = (".non_ema", ".non_ema.fp16")
_SAFE_KINDS = ("{variant}.safetensors", ".safetensors.index{variant}.json")
_KINDS = (*_SAFE_KINDS, "{variant}.bin", ".bin.index{variant}.json")
"""Endings of weight files, which a variant is named in."""


@dataclass(frozen=True)
class Weights:
    """The content of a model's weight files."""

    tensors: dict[str, Tensor]
    """By name, on the CPU, as stored."""
    hash: str
    """sha256 of the file; of shards, that of their names and hashes."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What a safetensors file says of itself."""


def read_weights(folder: Path, averaged: bool = True, pickles: bool = True) -> Weights:
    """Read the weights that diffusers saved in a folder, safetensors if there are any.

    Those of full precision come first, then the variants of half precision.

    Args:
        folder: of the network.
        averaged: False: rather the variant `non_ema`, weights without averaging, if there is one.
        pickles: whether files that torch has pickled will do, of which only tensors are taken.

    Raises:
        UserError: no weight file, or a damaged one.
    """
    file = find_weights(folder, averaged, pickles)
    if ".index" in file.name:
        return _read_shards(file)
    return read_pickle(file) if file.suffix == ".bin" else read_safetensors(file)


def find_weights(folder: Path, averaged: bool = True, pickles: bool = True) -> Path:
    """Return the file that `read_weights` reads, which may be an index of others.

    Args:
        folder: of the network.
        averaged: as in `read_weights`.
        pickles: as in `read_weights`.

    Raises:
        UserError: no weight file, or an index that lists pickles where none will do.
    """
    for variant in _PRECISIONS if averaged else (*_NOT_AVERAGED, *_PRECISIONS):
        for kind in _KINDS if pickles else _SAFE_KINDS:
            file = folder / f"{_STEM}{kind.format(variant=variant)}"
            if file.exists() and (pickles or _is_safe(file)):
                return file
    if any(".non_ema." in path.name for path in folder.glob(f"{_STEM}*")):
        raise UserError(
            f"there are no averaged weights in {folder}, only those without averaging (non_ema); "
            "ask for these: `weights` model"
        )
    formats = f", or {_STEM}.bin" if pickles else ""
    again = "download or save the whole model again"
    if not pickles and any(folder.glob("*.bin")):
        again = "other formats can run code: save it with save_pretrained(…), which writes that one"
    raise UserError(
        f"there are no weights in {folder}, which holds {listing(folder)}: it needs {SAFETENSORS}, "
        f"or that with .index.json and its shards{formats}, or the same with .fp16 before the "
        f"ending; {again}"
    )


def shards_of(file: Path) -> tuple[Path, ...]:
    """Return the files that hold the tensors: those that an index lists, or the file itself.

    Raises:
        UserError: an index that is damaged.
    """
    if ".index" not in file.name:
        return (file,)
    weight_map = read_part(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise UserError(f"{file} has no weight_map of files beside it; download it again")
    return tuple(file.parent / name for name in sorted(set(weight_map.values())))


def _is_safe(file: Path) -> bool:
    return all(shard.suffix == ".safetensors" for shard in shards_of(file))


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


def check_no_other_weights(folder: Path) -> None:
    """Check that a folder holds no weights that would be read in place of `SAFETENSORS`.

    Raises:
        UserError: naming them.
    """
    own = (SAFETENSORS, SAFETENSORS + TEMPORARY_SUFFIX)
    others = sorted(path for path in folder.glob(f"{_STEM}*") if path.name not in own)
    if others:
        names = ", ".join(path.name for path in others)
        raise UserError(
            f"{folder} holds other weights ({names}), which might be read in place of the new "
            "ones; move them elsewhere, or choose another folder"
        )


def weights_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """Write tensors as safetensors; an error of that library becomes an `OSError`."""

    def write(path: Path) -> None:
        # safetensors takes only contiguous tensors; ours are channels-last.
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, path, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error

    return write


def fill(model: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Copy tensors into a model's parameters, which keep their precision.

    Raises:
        UserError: as `check_tensors`.
    """
    check_tensors(model, tensors, origin)
    model.load_state_dict(dict(tensors))


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Check that tensors are those of a model.

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


def read_safetensors(file: Path) -> Weights:
    """Read a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
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
    tensors: dict[str, Tensor] = {}
    hashes = {}
    for file in shards_of(index):
        read = read_pickle if file.suffix == ".bin" else read_safetensors
        shard = read(file)
        tensors |= shard.tensors
        hashes[file.name] = shard.hash
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return Weights(tensors, digest)
