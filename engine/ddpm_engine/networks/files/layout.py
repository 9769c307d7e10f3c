"""The folders that diffusers saves models in.

today's                                        flat, and a network saved alone
DIR/model_index.json                           DIR/config.json
DIR/unet/config.json                           DIR/scheduler_config.json
DIR/unet/diffusion_pytorch_model.safetensors   DIR/diffusion_pytorch_model.bin
DIR/scheduler/scheduler_config.json

and what its training saves meanwhile: DIR/unet and DIR/unet_ema, the average, beside the optimizer.
A transformer is in DIR/transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import listing, read_part

INDEX = "model_index.json"
NETWORK_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
PARTS = ("unet", "transformer")
"""Folders that pipelines keep their networks in."""
AUTOENCODER = "vae"
"""Folder of the autoencoder of a latent model."""
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""Folders of what encodes prompts."""
LEFT_OUT = {
    "safety_checker": "samples are not checked",
    "feature_extractor": "only the safety checker uses it",
    "image_encoder": "only adapters use it",
}
"""Parts that samples do not depend on, and what it means that they are not opened."""
_REFUSED = {
    "text_encoder_2": "this engine has networks with one text encoder, and not Stable Diffusion XL",
    "text_encoder_3": "this engine has networks with one text encoder",
    "controlnet": "this engine has no ControlNet; load the pipeline without it",
    "adapter": "this engine has no adapters; load the pipeline without it",
    "prior": "this engine opens the prior and the decoder each as a model of its own",
    "low_res_scheduler": "this engine does not noise a latent's low-resolution image",
}
"""Parts that samples depend on, and why there are none here."""
_AVERAGE = "_ema"
CARD = "README.md"
EXPORT_MARK = "<!-- Written by ddpm-engine's export"
"""What the card of an export of ours begins its text with."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a saved model are."""

    network: Path
    """The folder of the network's `config.json` and weights."""
    scheduler: Path
    """The scheduler's configuration; absent if the network was saved alone."""
    index: Path | None = None
    """The `model_index.json`, if there is one."""
    autoencoder: Path | None = None
    """The folder of the autoencoder whose latents the network generates; None: it has none."""
    text_encoder: Path | None = None
    """The folder that holds text encoder and tokenizer, each in one of its own; None: it has
    none."""


def is_diffusers(path: Path) -> bool:
    """Whether a folder looks like something that diffusers saved."""
    parts = [part + ending for part in PARTS for ending in ("", _AVERAGE)]
    known = (INDEX, *(f"{part}/{NETWORK_CONFIG}" for part in parts))
    if any((path / name).exists() for name in known) or is_export(path):
        return True
    config = path / NETWORK_CONFIG
    return config.exists() and "_class_name" in read_part(config)


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of ours, finished or not."""
    try:
        return EXPORT_MARK in (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def find_layout(path: Path, averaged: bool = True) -> Layout:
    """Find the parts of a saved model.

    Args:
        path: of the model's folder.
        averaged: which network of a training checkpoint; that of any other folder is what it is.

    Raises:
        UserError: there is no such folder or no network in it, or the model has further parts.
    """
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; give one that holds a saved model, or the name of one on "
            "the Hugging Face hub"
        )
    further: dict[str, Path] = {}
    if (path / INDEX).exists():
        parts = _check_parts(path / INDEX)
        further["index"] = path / INDEX
        if AUTOENCODER in parts:
            further["autoencoder"] = path / AUTOENCODER
        if TEXT_ENCODER in parts:
            further["text_encoder"] = path
    elif (average := _average_in(path)) is not None:
        return _training_layout(path, average, averaged)
    for part in PARTS:
        if (path / part / NETWORK_CONFIG).exists():
            return Layout(path / part, path / "scheduler" / SCHEDULER_CONFIG, **further)
    if (path / NETWORK_CONFIG).exists():
        return Layout(path, path / SCHEDULER_CONFIG)
    if is_export(path):
        raise UserError(f"the export to {path} was interrupted; run it again")
    listed = ", ".join(f"{part}/{NETWORK_CONFIG}" for part in PARTS)
    raise UserError(
        f"{path} holds no diffusers model, neither {listed} nor {NETWORK_CONFIG}, but "
        f"{listing(path)}"
    )


def has_average_apart(path: Path) -> bool:
    """Whether a saved model has an average of its weights and those without averaging."""
    folders = (path, *(path / part for part in PARTS))
    variants = (file.name for folder in folders for file in folder.glob("*.non_ema.*"))
    return _average_in(path) is not None or any(variants)


def averaged_part(part: str) -> str:
    """Name of the folder of a training checkpoint that a part's average is in."""
    return part + _AVERAGE


def _average_in(path: Path) -> str | None:
    """The part of which a folder holds an average, as training checkpoints do."""
    found = (part for part in PARTS if (path / averaged_part(part) / NETWORK_CONFIG).exists())
    return next(found, None)


def _training_layout(path: Path, part: str, averaged: bool) -> Layout:
    """The parts of a training checkpoint; its pipeline, if there is one, is in the folder above."""
    network = path / (averaged_part(part) if averaged else part)
    if not (network / NETWORK_CONFIG).exists():
        raise UserError(
            f"{path} holds the averaged network {averaged_part(part)} and not {network.name}; ask "
            "for the average: `weights` ema"
        )
    places = [path / "scheduler" / SCHEDULER_CONFIG, path.parent / "scheduler" / SCHEDULER_CONFIG]
    return Layout(network, next((place for place in places if place.exists()), places[0]))


def _check_parts(index: Path) -> list[str]:
    """Refuse models that need more than this engine has; return the names of the parts."""
    parts = [
        name
        for name, value in read_part(index).items()
        if isinstance(value, list) and any(part is not None for part in value)
    ]
    known = (*PARTS, "scheduler", AUTOENCODER, TEXT_ENCODER, TOKENIZER, *LEFT_OUT)
    further = [name for name in parts if name not in known]
    if further:
        reasons = [f"{name} ({_REFUSED[name]})" if name in _REFUSED else name for name in further]
        raise UserError(
            f"{index} lists {', '.join(reasons)} besides network, scheduler, autoencoder and text "
            "encoder; this engine samples from models that need nothing else"
        )
    for name in parts:
        folder = index.parent / name
        if name not in LEFT_OUT and not folder.is_dir():
            raise UserError(
                f"{index} lists {name}, and there is no folder {folder} beside it, but "
                f"{listing(index.parent)}; download or save the whole model again"
            )
    return parts
