"""What the sections of a configuration demand of each other where an autoencoder is trained."""

from __future__ import annotations

from collections.abc import Iterator

from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.objectives.config import AutoencodingConfig, DistillationConfig, ObjectiveConfig
from ddpm_engine.samplers.config import SamplingConfig

_OF_DIFFUSION = {
    "diffusion": DiffusionConfig(),
    "objective": ObjectiveConfig(),
    "sampling": SamplingConfig(),
    "distillation": DistillationConfig(),
}


def autoencoder(config: RunConfig) -> Iterator[UserError]:
    """An autoencoder is trained on images, and nothing is said of noise that it does not know."""
    if not isinstance(config.model, AutoencoderKLConfig):
        if config.autoencoding != AutoencodingConfig():
            yield UserError(
                f"`autoencoding` is {config.autoencoding}, but the network is no autoencoder; "
                "leave it out",
                "autoencoding",
            )
        return
    for name, plain in _OF_DIFFUSION.items():
        if getattr(config, name) != plain:
            yield UserError(
                f"`{name}` is {getattr(config, name)}, but the network is an autoencoder, which "
                "does not diffuse; leave it out",
                name,
            )
    if config.data.diffuse != "images":
        yield UserError(
            f"`data.diffuse` is {config.data.diffuse}, but the network is an autoencoder, of "
            "images; leave it out",
            "data.diffuse",
        )
