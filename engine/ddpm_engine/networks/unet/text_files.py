"""Files of a U-Net that attends to text: those of diffusers' `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.networks.unet.config import UNetConfig, head_channels

CLASS = "UNet2DConditionModel"

_PROJECTION = "projection"
_MIDDLE = "UNetMidBlock2DCrossAttn"
_VECTOR, _THEIR_VECTOR = "vector_embedding.", "class_embedding."

_SUPPORTED: list[tuple[str, tuple[Any, ...], Any]] = [
    ("act_fn", ("silu", "swish"), "silu"),
    ("addition_embed_type", (None,), None),
    ("attention_type", ("default",), "default"),
    ("center_input_sample", (False,), False),
    ("class_embeddings_concat", (False,), False),
    ("conv_in_kernel", (3,), 3),
    ("conv_out_kernel", (3,), 3),
    ("cross_attention_norm", (None,), None),
    ("dual_cross_attention", (False,), False),
    ("encoder_hid_dim_type", (None, "text_proj"), None),
    ("mid_block_only_cross_attention", (None, False), None),
    ("mid_block_type", (_MIDDLE,), _MIDDLE),
    ("num_attention_heads", (None,), None),
    ("only_cross_attention", (False,), False),
    ("resnet_out_scale_factor", (1, 1.0), 1.0),
    ("resnet_skip_time_act", (False,), False),
    ("reverse_transformer_layers_per_block", (None,), None),
    ("time_cond_proj_dim", (None,), None),
    ("time_embedding_act_fn", (None,), None),
    ("time_embedding_type", ("positional",), "positional"),
    ("timestep_post_act", (None,), None),
    # Softmax is in float32 here in any case.
    ("upcast_attention", (False, True), False),
]
"""Entries with the values that can be honoured, and the class's default."""

# Entries that only other embeddings than those above read.
_IGNORED = ("addition_embed_type_num_heads", "addition_time_embed_dim")


def take_fields(entries: Entries, channels: Sequence[int]) -> dict[str, Any]:
    """Take the entries of a `UNet2DConditionModel` that a `UNet2DModel` does not share.

    Args:
        entries: of its `config.json`.
        channels: of each level.

    Returns:
        Fields of `UNetConfig` by name.

    Raises:
        UserError: naming an entry whose value `UNet` cannot honour.
    """
    for name, supported, default in _SUPPORTED:
        entries.require(name, supported, default)
    for name in _IGNORED:
        entries.take_any(name, None)
    kind = entries.take_optional("class_embed_type", str, None)
    if kind not in (None, _PROJECTION):
        entries.refuse("class_embed_type", kind, f"this engine has only {_PROJECTION} or null")
    vector = entries.take_optional("projection_class_embeddings_input_dim", int, None)
    if kind is not None and vector is None:
        entries.refuse("projection_class_embeddings_input_dim", vector, "give its channels")
    levels = len(channels)
    down = _types(entries, "down_block_types", 3 * ["CrossAttnDownBlock2D"] + ["DownBlock2D"])
    up = _types(entries, "up_block_types", ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"])
    layers = _of_levels(entries, "transformer_layers_per_block", 1, levels)
    return {
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": _one(entries, "cross_attention_dim", 1280, levels),
        "encoder_hid_dim": entries.take_optional("encoder_hid_dim", int, None),
        "layers_per_block": _one(entries, "layers_per_block", 2, levels),
        "transformer_layers_per_block": _shortest(layers),
        "use_linear_projection": entries.take("use_linear_projection", bool, False),
        "attention_head_dim": _head_dims(entries, channels, [*zip(down, up[::-1], strict=False)]),
        "vector_channels": None if kind is None else vector,
    }


def config_entries(config: UNetConfig) -> dict[str, Any]:
    """The entries of a `config.json` that a `UNet2DModel` does not share.

    Args:
        config: of a network that attends to text.

    Raises:
        UserError: the network does what that class cannot do.
    """
    for name in ("down_block_types", "up_block_types"):
        for kind in getattr(config, name):
            if kind.startswith("Attn"):
                raise UserError(
                    f"`model.{name}` has {kind} in a network that attends to text, of which the "
                    f"{CLASS} of diffusers does not know the heads; sample the network with this "
                    "engine",
                    f"model.{name}",
                )
    if config.vector_channels is not None and config.num_class_embeds is not None:
        raise UserError(
            f"`model.vector_channels` is {config.vector_channels} in a network with classes, but "
            f"the {CLASS} of diffusers has either a vector or classes; sample the network with "
            "this engine",
            "model.vector_channels",
        )
    widths = config.block_out_channels
    heads = [width // head_channels(config, level) for level, width in enumerate(widths)]
    return {
        "_class_name": CLASS,
        "attention_head_dim": _shortest(heads),  # what that class calls so
        "class_embed_type": None if config.vector_channels is None else _PROJECTION,
        "cross_attention_dim": config.cross_attention_dim,
        "encoder_hid_dim": config.encoder_hid_dim,
        "encoder_hid_dim_type": None if config.encoder_hid_dim is None else "text_proj",
        "mid_block_type": _MIDDLE,
        "projection_class_embeddings_input_dim": config.vector_channels,
        "transformer_layers_per_block": config.transformer_layers_per_block,
        "use_linear_projection": config.use_linear_projection,
    }


def from_stored(config: UNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the engine's names: a vector's embedding is the class's in diffusers."""
    if config.vector_channels is None:
        return dict(tensors)
    return {_renamed(name, _THEIR_VECTOR, _VECTOR): tensor for name, tensor in tensors.items()}


def to_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `from_stored`."""
    return {_renamed(name, _VECTOR, _THEIR_VECTOR): tensor for name, tensor in tensors.items()}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _types(entries: Entries, name: str, default: list[str]) -> tuple[str, ...]:
    types = tuple(entries.take(name, list, default))
    for kind in types:
        if str(kind).startswith("Attn"):
            entries.refuse(name, list(types), f"beside text this engine does not read {kind}")
    return types


def _head_dims(
    entries: Entries, channels: Sequence[int], types: Sequence[tuple[str, str]]
) -> int | tuple[int, ...]:
    """Read channels of a head where the file has, under that name, the number of heads.

    Source: https://github.com/huggingface/diffusers/issues/2011
    """
    heads = _of_levels(entries, "attention_head_dim", 8, len(channels))
    dims = []
    for level, (width, number) in enumerate(zip(channels, heads, strict=True)):
        kinds = types[level] if level < len(types) else ()
        attends = level == len(channels) - 1 or any(str(kind).startswith("Cross") for kind in kinds)
        if number < 1 or (attends and width % number):
            entries.refuse(
                "attention_head_dim", number, f"{CLASS} reads it as the number of heads, which "
                f"must divide the {width} channels of a level that attends",
            )  # fmt: skip
        dims.append(max(width // number, 1))
    return _shortest(dims)


def _of_levels(entries: Entries, name: str, default: int, levels: int) -> list[int]:
    """Take a number of all levels, or one of each."""
    value = entries.take_any(name, default)
    numbers = value if isinstance(value, list) else [value] * levels
    if len(numbers) != levels or not all(type(one) is int and one < 2**20 for one in numbers):
        entries.refuse(name, value, "it must be a whole number, or a list of one for each level")
    return numbers


def _one(entries: Entries, name: str, default: int, levels: int) -> int:
    """Take a number that all levels have in common here."""
    numbers = _of_levels(entries, name, default, levels)
    if len(set(numbers)) > 1:
        entries.refuse(name, numbers, "this engine has one for all levels")
    return numbers[0]


def _shortest(numbers: Sequence[int]) -> int | tuple[int, ...]:
    """The number that all levels have, or a tuple of each level's."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)
