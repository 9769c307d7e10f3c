"""The folders that diffusers saves models in.

today's                                        flat, and a network saved alone
DIR/model_index.json                           DIR/config.json
DIR/unet/config.json                           DIR/scheduler_config.json
DIR/unet/diffusion_pytorch_model.safetensors   DIR/diffusion_pytorch_model.bin
DIR/scheduler/scheduler_config.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import read_part

INDEX = "model_index.json"
NETWORK_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a saved model are."""

    network: Path
    """The folder of the network's `config.json` and weights."""
    scheduler: Path
    """The scheduler's configuration; absent if the network was saved alone."""


def is_diffusers(path: Path) -> bool:
    """Whether a folder looks like something that diffusers saved."""
    if (path / INDEX).exists() or (path / "unet" / NETWORK_CONFIG).exists():
        return True
    config = path / NETWORK_CONFIG
    return config.exists() and "_class_name" in read_part(config)


def find_layout(path: Path) -> Layout:
    """Find the parts of a saved model.

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
    if (path / "unet" / NETWORK_CONFIG).exists():
        return Layout(path / "unet", path / "scheduler" / SCHEDULER_CONFIG)
    if (path / NETWORK_CONFIG).exists():
        return Layout(path, path / SCHEDULER_CONFIG)
    raise UserError(
        f"{path} holds no diffusers model: neither unet/{NETWORK_CONFIG} nor {NETWORK_CONFIG}"
    )


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
