"""Files of a U-Net: configuration, parameter names and weights of diffusers' `UNet2DModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.networks.files.layout import NETWORK_CONFIG
from ddpm_engine.networks.files.together import Writer, json_writer, write_together
from ddpm_engine.networks.files.weights import (
    SAFETENSORS,
    check_no_other_weights,
    read_weights,
    weights_writer,
)
from ddpm_engine.networks.unet.config import UNetConfig, check_shape

CLASS = "UNet2DModel"

# Entries that do not change what the network computes: one that only a learned time embedding
# reads, which is refused, and what diffusers' EMA writes beside an averaged network. (Entries that
# begin with an underscore are the library's own notes.)
_IGNORED = (
    "num_train_timesteps", "decay", "inv_gamma", "min_decay", "optimization_step", "power",
    "update_after_step", "use_ema_warmup",
)  # fmt: skip

_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FORMER = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_FORMER_NAMES)})\.(weight|bias)")
_PROJECTION = re.compile(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


@dataclass(frozen=True)
class StoredUNet:
    """A U-Net as it is stored."""

    config: UNetConfig
    tensors: Mapping[str, Tensor]
    """By today's parameter names, on the CPU, in any precision."""
    hash: str
    """SHA-256 of the weight file."""
    null_class: int | None
    """Label of the null class, if the file says so; ours do."""


def read_unet(folder: Path, averaged: bool = True) -> StoredUNet:
    """Read the network whose `config.json` and weights are in a folder.

    Args:
        folder: of the network.
        averaged: see `read_weights`.

    Raises:
        UserError: a part is missing or damaged, or `UNet` cannot be that network.
    """
    config = read_config(folder / NETWORK_CONFIG)
    weights = read_weights(folder, averaged)
    null_class = weights.metadata.get("null_class", "")
    return StoredUNet(
        config,
        todays_names(weights.tensors),
        weights.hash,
        int(null_class) if null_class.isdecimal() else None,
    )


def write_unet(
    folder: Path, config: UNetConfig, tensors: Mapping[str, Tensor], null_class: int | None
) -> None:
    """Write a network as diffusers' `UNet2DModel` is saved.

    Args:
        folder: created if missing; other files in it stay.
        config: of the network.
        tensors: its state dict.
        null_class: label of the null class, which diffusers' files do not record.

    Raises:
        UserError: diffusers has no such network, or the folder holds weights of another kind.
        OSError: the folder cannot be written.
    """
    check_no_other_weights(folder)
    write_together(folder, unet_writers(config, tensors, null_class), [NETWORK_CONFIG])


def unet_writers(
    config: UNetConfig, tensors: Mapping[str, Tensor], null_class: int | None
) -> dict[str, Writer]:
    """Writers of the files of `write_unet`, by name.

    Raises:
        UserError: diffusers has no such network.
    """
    metadata = {"format": "pt"}  # without it diffusers does not read the file
    if null_class is not None:
        metadata["null_class"] = str(null_class)
    return {
        SAFETENSORS: weights_writer(tensors, metadata),
        NETWORK_CONFIG: json_writer(config_entries(config)),
    }


def read_config(file: Path) -> UNetConfig:
    """Read a `UNet2DModel`'s configuration; absent entries have that class's defaults.

    Raises:
        UserError: naming an entry that is unknown, or whose value `UNet` cannot honour.
    """
    entries = Entries(file)
    entries.require("_class_name", (CLASS,), None)
    for name, supported, default in [
        ("act_fn", ("silu", "swish"), "silu"),
        ("add_attention", (True,), True),
        ("center_input_sample", (False,), False),
        ("class_embed_type", (None,), None),
        ("downsample_type", ("conv",), "conv"),
        ("mid_block_type", ("UNetMidBlock2D",), "UNetMidBlock2D"),
        ("time_embedding_type", ("positional",), "positional"),
        ("upsample_type", ("conv",), "conv"),
    ]:
        entries.require(name, supported, default)
    channels = tuple(entries.take("block_out_channels", list, [224, 448, 672, 896]))
    if not channels or not all(type(width) is int and width < 2**20 for width in channels):
        entries.refuse("block_out_channels", channels, "it must list the channels of each level")
    entries.require("time_embedding_dim", (None, 4 * channels[0]), None)
    attending = ["DownBlock2D"] + 3 * ["AttnDownBlock2D"]
    ascending = 3 * ["AttnUpBlock2D"] + ["UpBlock2D"]
    config = UNetConfig(
        sample_size=_sample_size(entries),
        in_channels=entries.take("in_channels", int, 3),
        out_channels=entries.take("out_channels", int, 3),
        block_out_channels=channels,
        # The types' names are checked with the shape.
        down_block_types=cast(Any, tuple(entries.take("down_block_types", list, attending))),
        up_block_types=cast(Any, tuple(entries.take("up_block_types", list, ascending))),
        layers_per_block=entries.take("layers_per_block", int, 2),
        attention_head_dim=entries.take_optional("attention_head_dim", int, 8),
        norm_num_groups=entries.take("norm_num_groups", int, 32),
        attn_norm_num_groups=entries.take_optional("attn_norm_num_groups", int, None),
        norm_eps=entries.take("norm_eps", float, 1e-5),
        dropout=entries.take("dropout", float, 0.0),
        resnet_time_scale_shift=cast(Any, entries.take("resnet_time_scale_shift", str, "default")),
        downsample_padding=entries.take("downsample_padding", int, 1),
        mid_block_scale_factor=entries.take("mid_block_scale_factor", float, 1.0),
        flip_sin_to_cos=entries.take("flip_sin_to_cos", bool, True),
        freq_shift=entries.take("freq_shift", int, 0),
        num_class_embeds=entries.take_optional("num_class_embeds", int, None),
    )
    entries.finish(_IGNORED)
    try:
        check_shape(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def config_entries(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` of the `UNet2DModel` that is this network.

    Raises:
        UserError: the network does what that one cannot do.
    """
    if config.low_resolution is not None:
        raise UserError(
            f"`model.low_resolution` is {config.low_resolution}, but the {CLASS} of diffusers has "
            "no super-resolution; sample the network with this engine",
            "model.low_resolution",
        )
    entries = {"_class_name": CLASS, **asdict(config)}
    del entries["attention"]  # how it is computed, not what
    del entries["low_resolution"]
    return entries


def todays_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename what older versions of diffusers saved, and squeeze attention's 1×1 convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        if former := _FORMER.fullmatch(name):
            name = f"{former[1]}.{_FORMER_NAMES[former[2]]}.{former[3]}"
        if _PROJECTION.fullmatch(name) and tensor.dim() > 2 and tensor.shape[2:].numel() == 1:
            tensor = tensor.reshape(tensor.shape[:2])
        renamed[name] = tensor
    return renamed


def _sample_size(entries: Entries) -> int:
    value = entries.take_any("sample_size", None)
    sides = value if isinstance(value, list) else [value]
    if not sides or any(type(side) is not int or side != sides[0] for side in sides):
        entries.refuse("sample_size", value, "write the side of its square images in pixels there")
    return sides[0]
