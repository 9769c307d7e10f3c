"""Configurations of autoencoders, as diffusers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import Entries

KL, TINY = "AutoencoderKL", "AutoencoderTiny"

_LISTS: Mapping[str, Mapping[str, list[Any]]] = {
    KL: {
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
    },
    TINY: {
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
    },
}
_VALUES: Mapping[str, Mapping[str, Any]] = {
    KL: {
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    TINY: {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
    },
}
"""Entries that the architecture depends on, and what the library takes them to be by default."""
_SCALES = {KL: 0.18215, TINY: 1.0}
_UPCAST = {KL: True, TINY: False}
# What only says how something is computed, or what `AutoencoderTiny.forward` alone reads.
_IGNORED = ("sample_size", "latent_magnitude", "latent_shift", "block_out_channels")
_MOST_LAYERS = 64


@dataclass(frozen=True)
class AutoencoderConfig:
    """What a `config.json` says of an autoencoder."""

    kind: str
    """`AutoencoderKL` or `AutoencoderTiny`."""
    architecture: dict[str, Any]
    """Arguments of that class."""
    scale: float
    """What latents are multiplied by."""
    shift: float
    """What is subtracted from latents before."""
    force_upcast: bool
    """Whether half precision overflows."""

    def entries(self) -> dict[str, Any]:
        """Everything that latents and images depend on, as JSON values."""
        return {
            "_class_name": self.kind, **self.architecture, "scaling_factor": self.scale,
            "shift_factor": self.shift,
        }  # fmt: skip


def read_config(file: Path) -> AutoencoderConfig:
    """Read the configuration of an autoencoder; absent entries have its class's defaults.

    Raises:
        UserError: no such file, another class, or an entry that cannot be honoured.
    """
    entries = Entries(file)
    kind = entries.take_any("_class_name", None)
    if kind not in (KL, TINY):
        entries.refuse("_class_name", kind, f"it must be {KL} or {TINY}, which can be opened")
    architecture = {n: entries.take(n, type(v), v) for n, v in _VALUES[kind].items()}
    for name, default in _LISTS[kind].items():
        architecture[name] = _list(entries, name, default)
    for name in ("latents_mean", "latents_std"):
        entries.require(name, (None,), None)
    scale = entries.take("scaling_factor", float, _SCALES[kind])
    if not scale > 0:
        entries.refuse("scaling_factor", scale, "it must be positive")
    # Of a tiny one, the library's pipelines know no shift.
    shift = entries.take_optional("shift_factor", float, None) or 0.0
    force_upcast = entries.take("force_upcast", bool, _UPCAST[kind])
    entries.finish(_IGNORED)
    channels, made = architecture["in_channels"], architecture["out_channels"]
    if channels != made or channels not in (1, 3):
        raise UserError(
            f"in_channels is {channels} and out_channels {made} in {file}: an autoencoder of "
            "images has the same number of both, 1 or 3"
        )
    return AutoencoderConfig(kind, architecture, scale, shift, force_upcast)


def _list(entries: Entries, name: str, default: list[Any]) -> list[Any]:
    values = entries.take(name, list, default)
    kind = type(default[0])
    if not values or len(values) > 16 or any(type(value) is not kind for value in values):
        names = "whole numbers" if kind is int else "names"
        entries.refuse(name, values, f"it must list {names}, one a level")
    return values
