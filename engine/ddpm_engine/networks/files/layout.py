"""The folders that diffusers saves models in.

today's                                        flat, and a network saved alone
DIR/model_index.json                           DIR/config.json
DIR/unet/config.json                           DIR/scheduler_config.json
DIR/unet/diffusion_pytorch_model.safetensors   DIR/diffusion_pytorch_model.bin
DIR/scheduler/scheduler_config.json

and what its training saves meanwhile: DIR/unet and DIR/unet_ema, the average, beside the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import listing, read_part

INDEX = "model_index.json"
NETWORK_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
_AVERAGE = "unet_ema"
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


def is_diffusers(path: Path) -> bool:
    """Whether a folder looks like something that diffusers saved."""
    known = (INDEX, f"unet/{NETWORK_CONFIG}", f"{_AVERAGE}/{NETWORK_CONFIG}")
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
    if (path / INDEX).exists():
        _check_parts(path / INDEX)
    elif (path / _AVERAGE / NETWORK_CONFIG).exists():
        return _training_layout(path, averaged)
    if (path / "unet" / NETWORK_CONFIG).exists():
        return Layout(path / "unet", path / "scheduler" / SCHEDULER_CONFIG)
    if (path / NETWORK_CONFIG).exists():
        return Layout(path, path / SCHEDULER_CONFIG)
    if is_export(path):
        raise UserError(f"the export to {path} was interrupted; run it again")
    raise UserError(
        f"{path} holds no diffusers model, neither unet/{NETWORK_CONFIG} nor {NETWORK_CONFIG}, but "
        f"{listing(path)}"
    )


def has_average_apart(path: Path) -> bool:
    """Whether a saved model has an average of its weights and those without averaging."""
    variants = (
        file.name for folder in (path, path / "unet") for file in folder.glob("*.non_ema.*")
    )
    return (path / _AVERAGE / NETWORK_CONFIG).exists() or any(variants)


def _training_layout(path: Path, averaged: bool) -> Layout:
    """The parts of a training checkpoint; its pipeline, if there is one, is in the folder above."""
    network = path / (_AVERAGE if averaged else "unet")
    if not (network / NETWORK_CONFIG).exists():
        raise UserError(
            f"{path} holds the averaged network {_AVERAGE} and not {network.name}; ask for the "
            "average: `weights` ema"
        )
    places = [path / "scheduler" / SCHEDULER_CONFIG, path.parent / "scheduler" / SCHEDULER_CONFIG]
    return Layout(network, next((place for place in places if place.exists()), places[0]))


def _check_parts(index: Path) -> None:
    """Refuse a latent model, whose network generates no images without its decoder."""
    further = [
        name
        for name, value in read_part(index).items()
        if name not in ("unet", "scheduler")
        and isinstance(value, list)
        and any(part is not None for part in value)
    ]
    if further:
        raise UserError(
            f"{index} lists {', '.join(further)} besides unet and scheduler; this engine samples "
            "from models of pixels that need nothing else"
        )
