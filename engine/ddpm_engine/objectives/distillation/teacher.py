"""The networks that a distillation begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.guidance import combine
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec, cat
from ddpm_engine.objectives.base import Network as Predict


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a distillation begins with."""

    network: Network
    """In eval mode; progressive distillation replaces its weights after each stage."""
    prediction: str
    """What the network predicts, until its weights are replaced."""
    student: Network | None = None
    """Initial student, where that is not the teacher; moment matching needs it."""
    critic: Network | None = None
    """Copy of the teacher to be trained; moment matching needs it."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that it was trained on, if it knows them."""
    autoencoder: str | None = None
    """Fingerprint of the autoencoder whose latents it samples, empty if it is not known; None: it
    samples images."""


def predict(
    network: Predict,
    z: Tensor,
    noise_level: Tensor,
    conditioning: Conditioning,
    spec: ConditioningSpec,
    guidance_scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Evaluate a network, with classifier-free guidance if a scale is given.

    Args:
        network: the teacher's.
        z: the network's input, `[B, C, H, W]`.
        noise_level: `[B]`.
        conditioning: of the samples.
        spec: the conditions that the network was built for.
        guidance_scale: or None.
        dtype: of the result and of the arithmetic.

    Returns:
        The prediction without its variance, shaped as `z`.
    """
    channels = z.shape[1]
    if guidance_scale is None:
        return network(z, noise_level, conditioning)[:, :channels].to(dtype)
    both = network(
        torch.cat([z, z]),
        torch.cat([noise_level, noise_level]),
        cat([conditioning, conditioning.null(spec)]),
    )
    conditional, unconditional = both[:, :channels].to(dtype).chunk(2)
    return combine(conditional, unconditional, guidance_scale)
