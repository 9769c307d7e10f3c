"""What a pipeline of a latent model holds besides a network and its scheduler, as files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_engine.data.classes import ClassNames
from ddpm_engine.errors import UserError
from ddpm_engine.interop.published import label_entries
from ddpm_engine.networks.autoencoder.folders import autoencoder_folder
from ddpm_engine.networks.files.entries import read_part
from ddpm_engine.networks.files.layout import (
    AUTOENCODER,
    NETWORK_CONFIG,
    TEXT_ENCODER,
    TOKENIZER,
)
from ddpm_engine.networks.files.together import Writer, json_writer
from ddpm_engine.networks.files.weights import (
    SAFETENSORS,
    read_safetensors,
    read_weights,
    weights_writer,
)
from ddpm_engine.networks.text.folders import text_encoder_files

_TEXT_WEIGHTS = "model.safetensors"
_FORMAT = {"format": "pt"}  # without it transformers and diffusers do not read the file


@dataclass(frozen=True)
class Further:
    """What a latent model has besides a network and its process."""

    autoencoder: str
    """Place of the autoencoder."""
    scale: float
    """What its latents are multiplied by."""
    shift: float
    """What is subtracted from them."""
    text_encoder: str | None = None
    """Place of the text encoder; None: the network takes no text."""
    padded: bool = False
    """Whether prompts are padded as in Stable Diffusion."""
    classes: ClassNames | None = None
    """Names of the classes, if they have any."""


def names(further: Further | None) -> tuple[str, ...]:
    """Names of the folders that are written."""
    if further is None:
        return ()
    return (AUTOENCODER,) if further.text_encoder is None else (
        AUTOENCODER, TEXT_ENCODER, TOKENIZER,
    )  # fmt: skip


def writers(folder: Path, further: Further) -> dict[str, Writer]:
    """Writers of the files of autoencoder, text encoder and tokenizer, by name.

    Weights are written as they are stored, each part's in one file.

    Args:
        folder: that they are for.
        further: the parts.

    Raises:
        UserError: a part cannot be read, or `folder` holds weights that might be read in its place.
    """
    place = autoencoder_folder(further.autoencoder)
    config = read_part(place / NETWORK_CONFIG)
    config["scaling_factor"] = further.scale
    if further.shift or config.get("shift_factor") is not None:
        config["shift_factor"] = further.shift
    tensors = read_weights(place, pickles=False).tensors
    files = {
        f"{AUTOENCODER}/{NETWORK_CONFIG}": json_writer(config),
        f"{AUTOENCODER}/{SAFETENSORS}": weights_writer(tensors, _FORMAT),
    }
    if further.text_encoder is not None:
        files |= _text_writers(folder, further.text_encoder)
    return files


def index_entries(further: Further, part: str) -> dict[str, Any]:
    """The entries of a `model_index.json` besides those of network and scheduler.

    Args:
        further: the parts.
        part: the network's, `unet` or `transformer`.
    """
    entries: dict[str, Any] = {AUTOENCODER: ["diffusers", _class_in(further)]}
    kind = "DiffusionPipeline"
    if part == "transformer":
        kind = kind if further.text_encoder else "DiTPipeline"
        entries |= label_entries(further.classes)
    if further.text_encoder is not None:
        model, tokenizer = text_encoder_files(further.text_encoder).classes
        entries |= {
            TEXT_ENCODER: ["transformers", model], TOKENIZER: ["transformers", tokenizer],
        }  # fmt: skip
        if further.padded and part == "unet":
            kind = "StableDiffusionPipeline"
            entries |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
            entries |= {"image_encoder": [None, None], "requires_safety_checker": False}
    return {"_class_name": kind, **entries}


def _class_in(further: Further) -> str:
    return str(read_part(autoencoder_folder(further.autoencoder) / NETWORK_CONFIG)["_class_name"])


def _text_writers(folder: Path, place: str) -> Mapping[str, Writer]:
    files = text_encoder_files(place)
    others = sorted(
        path.name for path in (folder / TEXT_ENCODER).glob("model*") if path.name != _TEXT_WEIGHTS
    )
    if others:
        raise UserError(
            f"{folder / TEXT_ENCODER} holds other weights ({', '.join(others)}), which might be "
            "read in place of the new ones; move them elsewhere, or choose another folder"
        )
    tensors: dict[str, Tensor] = {}
    for path in files.weights:
        tensors |= read_safetensors(path).tensors
    return {
        f"{TEXT_ENCODER}/{NETWORK_CONFIG}": json_writer(files.config),
        f"{TEXT_ENCODER}/{_TEXT_WEIGHTS}": weights_writer(tensors, _FORMAT),
        **{f"{TOKENIZER}/{path.name}": partial(_copy, path) for path in files.vocabulary},
    }


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
