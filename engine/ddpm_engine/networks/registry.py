"""Which network a configuration describes."""

from __future__ import annotations

from typing import Any

from ddpm_engine.networks.base import Network

NETWORKS: dict[type[Any], type[Network]] = {}
"""Configuration class → network class; `networks.build` adds those of the engine. An entry of your
own makes your network one that runs train: its configuration is a frozen dataclass with at least
`sample_size`, `in_channels`, `out_channels` and `num_class_embeds`, as `UNetConfig` has them."""
