"""Autoencoders in folders as diffusers saves them. Nothing in a folder is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.autoencoder import Autoencoder, memory_format
from ddpm_engine.networks.autoencoder.config import AutoencoderConfig, read_config
from ddpm_engine.networks.files.entries import listing
from ddpm_engine.networks.files.former_names import todays_names
from ddpm_engine.networks.files.layout import AUTOENCODER, NETWORK_CONFIG
from ddpm_engine.networks.files.places import fingerprint_of, folder_at
from ddpm_engine.networks.files.weights import (
    check_tensors,
    find_weights,
    read_weights,
    shards_of,
)

_PROBE = 128
"""Pixels along the side of the image that shapes are found with; more levels than 2⁷ nobody has."""


def open_autoencoder(
    place: str, device: torch.device | str = "cpu", half: bool = False
) -> Autoencoder:
    """Open an autoencoder, frozen.

    Args:
        place: a folder as diffusers saves an `AutoencoderKL` or `AutoencoderTiny`, or a pipeline
            of diffusers that holds one, or `package:NAME` for a folder in an installed Python
            package.
        device: where it computes.
        half: whether to decode in float16 if its configuration does not say that this overflows
            (`force_upcast`). Images are encoded in float32 in any case.

    Raises:
        UserError: diffusers is not installed, nothing is there, it is another model, its weights
            are not safetensors, are damaged or not finite, or belong to another configuration.
    """
    folder = autoencoder_folder(place)
    config = read_config(folder / NETWORK_CONFIG)
    weights = read_weights(folder, pickles=False)
    fingerprint = _fingerprint(folder, config)
    model = _build(place, config)
    tensors = todays_names(weights.tensors)
    check_tensors(model, tensors, folder)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"the weights of the autoencoder {place} hold NaN or infinity, in {name}; save it "
                "again, from weights that are finite"
            )
    factor = _factor(place, config, model)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    model.eval().requires_grad_(False)
    model.to(device, memory_format=memory_format(torch.device(device)))
    if half and not config.force_upcast:
        for part in (model.decoder, getattr(model, "post_quant_conv", None)):
            if part is not None:
                part.half()
    return Autoencoder(
        model,
        place,
        fingerprint,
        channels=config.architecture["latent_channels"],
        factor=factor,
        image_channels=config.architecture["in_channels"],
        scale=config.scale,
        shift=config.shift,
    )


def autoencoder_fingerprint(place: str) -> str:
    """Identify an autoencoder without loading it: the `fingerprint` that `open_autoencoder` finds.

    Args:
        place: as `open_autoencoder` takes it.

    Raises:
        UserError: nothing is there, it is another model, or its weights are not safetensors.
    """
    folder = autoencoder_folder(place)
    return _fingerprint(folder, read_config(folder / NETWORK_CONFIG))


def autoencoder_folder(place: str) -> Path:
    """Return the folder with an autoencoder's configuration.

    Args:
        place: as `open_autoencoder` takes it.

    Raises:
        UserError: nothing is there.
    """
    folder = folder_at(place, "autoencoder", "diffusers", NETWORK_CONFIG)
    for found in (folder / AUTOENCODER, folder):
        if (found / NETWORK_CONFIG).is_file():
            return found
    raise UserError(
        f"there is no autoencoder in {place}, which holds {listing(folder)}; give the folder with "
        f"its {NETWORK_CONFIG}, as diffusers saves it"
    )


def _fingerprint(folder: Path, config: AutoencoderConfig) -> str:
    return fingerprint_of(config.entries(), shards_of(find_weights(folder, pickles=False)))


def _build(place: str, config: AutoencoderConfig) -> Any:
    """Build the model without memory for its weights."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"the autoencoder {place} needs diffusers: pip install 'ddpm-engine[latents]'"
        ) from error
    # Nonsense in a configuration fails in more ways than the library has error classes.
    try:
        with torch.device("meta"):
            return getattr(diffusers, config.kind)(**config.architecture)
    except Exception as error:
        raise _unusable(place, error) from error


def _factor(place: str, config: AutoencoderConfig, model: Any) -> int:
    """Find out how many pixels a latent stands for along a side, on a device without memory."""
    shape = (1, config.architecture["in_channels"], _PROBE, _PROBE)
    try:
        with torch.no_grad():
            latents = model.encoder(torch.empty(shape, device="meta"))
            latents = latents[:, : config.architecture["latent_channels"]]
            images = model.decoder(latents)
    except Exception as error:
        raise _unusable(place, error) from error
    if tuple(images.shape) != shape or _PROBE % latents.shape[2]:
        raise UserError(
            f"the autoencoder {place} makes images of {tuple(images.shape[1:])} from latents of "
            f"{tuple(latents.shape[1:])}, which it makes from images of {tuple(shape[1:])}; it has "
            "to give back the size it takes"
        )
    return _PROBE // latents.shape[2]


def _unusable(place: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"the configuration of the autoencoder {place} cannot be used: {reason}")
