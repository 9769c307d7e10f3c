"""Which network a configuration describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.stored import StoredNetwork
from ddpm_engine.networks.unet.config import UNetConfig

if TYPE_CHECKING:
    NetworkConfig: TypeAlias = Any  # a class of your own, too
else:
    NetworkConfig = UNetConfig | DiTConfig | PriorConfig
"""Configuration of a network: that of one of the engine's families, or another in `NETWORKS`."""

CONFIGURATIONS: tuple[type[Any], ...] = (UNetConfig, DiTConfig, PriorConfig, AutoencoderKLConfig)
"""Those of the engine: networks that denoise, and an autoencoder, which is trained to reconstruct.
"""

NETWORKS: dict[type[Any], type[Network]] = {}
"""Configuration class → network class; `networks.build` adds those of the engine. An entry of your
own makes your network one that runs train: its configuration is a frozen dataclass with at least
`sample_size`, `in_channels`, `out_channels` and `num_class_embeds`, as `UNetConfig` has them."""


def same_network(one: Any, other: Any) -> bool:
    """Whether two configurations describe one network, whose samples are the same.

    Fields that a configuration's `INCIDENTAL` lists may differ.

    Args:
        one: of a class in `NETWORKS`.
        other: likewise.
    """
    if type(one) is not type(other):
        return False
    incidental = {name: getattr(other, name) for name in getattr(one, "INCIDENTAL", ())}
    return bool(replace(one, **incidental) == other)


def stored_class(file: Path) -> type[StoredNetwork]:
    """Find the class of the network whose `config.json` of diffusers this is.

    Raises:
        UserError: a file that is missing or damaged, or of a class that the engine does not have.
    """
    entries = Entries(file)
    known = {
        name: network
        for network in NETWORKS.values()
        if issubclass(network, StoredNetwork)
        for name in network.format.class_names
    }
    given = entries.take_any("_class_name", None)
    if given not in known:
        entries.refuse("_class_name", given, f"this engine has {' and '.join(known)}")
    return known[given]
