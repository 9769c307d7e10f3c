"""The one place that names network classes."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_engine.errors import UserError
from ddpm_engine.memory import check_fits
from ddpm_engine.networks.autoencoder.kl import AutoencoderKL
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.dit.dit import DiT
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.prior.prior import Prior
from ddpm_engine.networks.registry import NETWORKS
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet

NETWORKS[UNetConfig] = UNet
NETWORKS[DiTConfig] = DiT
NETWORKS[PriorConfig] = Prior
NETWORKS[AutoencoderKLConfig] = AutoencoderKL


def build_network(config: Any, initialised: bool = True) -> Network:
    """Build the network that a configuration describes, on the CPU.

    Args:
        config: of a class in `NETWORKS`.
        initialised: whether to give it initial weights, which takes a while; False: its weights are
            arbitrary, for a checkpoint to overwrite.

    Raises:
        UserError: a configuration of no known network, a shape that cannot be built, or weights
            that do not fit into memory.
    """
    if type(config) not in NETWORKS:
        known = ", ".join(kind.__name__ for kind in NETWORKS)
        raise UserError(
            f"model is a {type(config).__name__}, which describes no known network; use one of "
            f"{known}, or add yours to ddpm_engine.networks.registry.NETWORKS"
        )
    with torch.device("meta"):
        network = NETWORKS[type(config)](config)
    weights = sum(tensor.numel() * tensor.itemsize for tensor in network.parameters())
    check_fits(weights, "model", "make the network narrower or shallower")
    if initialised:
        return NETWORKS[type(config)](config)
    # Buffers may be computed by the constructor and be in no checkpoint.
    computed = any(True for _ in network.buffers())
    return NETWORKS[type(config)](config) if computed else network.to_empty(device="cpu")
