"""Files of a U-Net: configuration, parameter names and weights of diffusers' `UNet2DModel`.

Those of one that attends to text are a `UNet2DConditionModel`'s; see `text_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.networks.files.format import Format
from ddpm_engine.networks.files.former_names import todays_names
from ddpm_engine.networks.unet import text_files
from ddpm_engine.networks.unet.config import UNetConfig, check_shape
from ddpm_engine.sizes import Size

CLASS = "UNet2DModel"
CLASSES = (CLASS, text_files.CLASS)

# Entries that do not change what the network computes: one that only a learned time embedding
# reads, which is refused, and what diffusers' EMA writes beside an averaged network. (Entries that
# begin with an underscore are the library's own notes.)
_IGNORED = (
    "num_train_timesteps", "decay", "inv_gamma", "min_decay", "optimization_step", "power",
    "update_after_step", "use_ema_warmup",
)  # fmt: skip

_SHARED = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types",
    "up_block_types", "layers_per_block", "norm_num_groups", "norm_eps", "dropout",
    "resnet_time_scale_shift", "downsample_padding", "mid_block_scale_factor", "flip_sin_to_cos",
    "freq_shift", "num_class_embeds",
)  # fmt: skip
"""Fields that are entries of both classes."""


def read_config(file: Path) -> UNetConfig:
    """Read the configuration of a U-Net; absent entries have its class's defaults.

    Raises:
        UserError: naming an entry that is unknown, or whose value `UNet` cannot honour.
    """
    entries = Entries(file)
    kind = entries.take_any("_class_name", None)
    if kind not in CLASSES:
        entries.refuse("_class_name", kind, f"this engine has {' and '.join(CLASSES)}")
    attends_to_text = kind == text_files.CLASS
    usual = [320, 640, 1280, 1280] if attends_to_text else [224, 448, 672, 896]
    channels = tuple(entries.take("block_out_channels", list, usual))
    if not channels or not all(type(width) is int and width < 2**20 for width in channels):
        entries.refuse("block_out_channels", channels, "it must list the channels of each level")
    entries.require("time_embedding_dim", (None, 4 * channels[0]), None)
    images = 4 if attends_to_text else 3
    own = text_files.take_fields(entries, channels) if attends_to_text else _take_fields(entries)
    config = UNetConfig(
        sample_size=_sample_size(entries),
        in_channels=entries.take("in_channels", int, images),
        out_channels=entries.take("out_channels", int, images),
        block_out_channels=channels,
        norm_num_groups=entries.take("norm_num_groups", int, 32),
        norm_eps=entries.take("norm_eps", float, 1e-5),
        dropout=entries.take("dropout", float, 0.0),
        resnet_time_scale_shift=cast(Any, entries.take("resnet_time_scale_shift", str, "default")),
        downsample_padding=entries.take("downsample_padding", int, 1),
        mid_block_scale_factor=entries.take("mid_block_scale_factor", float, 1.0),
        flip_sin_to_cos=entries.take("flip_sin_to_cos", bool, True),
        freq_shift=entries.take("freq_shift", int, 0),
        num_class_embeds=entries.take_optional("num_class_embeds", int, None),
        **own,
    )
    entries.finish(_IGNORED)
    try:
        check_shape(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def _take_fields(entries: Entries) -> dict[str, Any]:
    """Take the entries of a `UNet2DModel` that the other class does not share."""
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
    attending = ["DownBlock2D"] + 3 * ["AttnDownBlock2D"]
    ascending = 3 * ["AttnUpBlock2D"] + ["UpBlock2D"]
    return {
        # The types' names are checked with the shape.
        "down_block_types": tuple(entries.take("down_block_types", list, attending)),
        "up_block_types": tuple(entries.take("up_block_types", list, ascending)),
        "layers_per_block": entries.take("layers_per_block", int, 2),
        "attention_head_dim": entries.take_optional("attention_head_dim", int, 8),
        "attn_norm_num_groups": entries.take_optional("attn_norm_num_groups", int, None),
    }


def config_entries(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` of the `UNet2DModel` or `UNet2DConditionModel` that is this network.

    Raises:
        UserError: the network does what that one cannot do.
    """
    attends_to_text = config.cross_attention_dim is not None
    kind = text_files.CLASS if attends_to_text else CLASS
    if config.low_resolution is not None:
        raise UserError(
            f"`model.low_resolution` is {config.low_resolution}, but the {kind} of diffusers has "
            "no super-resolution; sample the network with this engine",
            "model.low_resolution",
        )
    shared = {name: getattr(config, name) for name in _SHARED}
    if attends_to_text:
        return {**text_files.config_entries(config), **shared}
    for name, value in [
        ("vector_channels", config.vector_channels),
        ("attention_head_dim", config.attention_head_dim),
    ]:
        if isinstance(value, tuple) or (name == "vector_channels" and value is not None):
            raise UserError(
                f"`model.{name}` is {value}, but the {CLASS} of diffusers has no such networks; "
                "sample this one with this engine",
                f"model.{name}",
            )
    return {
        "_class_name": CLASS,
        **shared,
        "attention_head_dim": config.attention_head_dim,
        "attn_norm_num_groups": config.attn_norm_num_groups,
    }


def _sample_size(entries: Entries) -> Size:
    value = entries.take_any("sample_size", None)
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        reason = "write the side of its images in pixels there, or height and width"
        entries.refuse("sample_size", value, reason)
    height, width = sides
    return height if height == width else (height, width)


def _description(config: UNetConfig) -> dict[str, str]:
    attending = (str(level) for level, kind in enumerate(config.down_block_types) if "Attn" in kind)
    text = config.text_channels
    name = CLASS if text is None else text_files.CLASS
    return {
        "network": f"U-Net of denoising diffusion probabilistic models (`{name}`)",
        "channels of each level": ", ".join(map(str, config.block_out_channels)),
        "levels that attend": ", ".join(attending) or "none",
        "residual blocks of each level": str(config.layers_per_block),
        **({} if text is None else {"text": f"attends to tokens of {text} channels"}),
    }


FORMAT = Format(
    class_names=CLASSES,
    part="unet",
    pipelines={"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"},
    read_config=read_config,
    config_entries=config_entries,
    from_stored=lambda config, tensors: text_files.from_stored(config, todays_names(tensors)),
    to_stored=lambda _, tensors: text_files.to_stored(tensors),
    description=_description,
)
"""How diffusers stores a U-Net."""
