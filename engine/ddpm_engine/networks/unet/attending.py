"""Which attention each level of a U-Net has, and the text that it attends to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.attention import Attention
from ddpm_engine.networks.unet.blocks import MakeAttention
from ddpm_engine.networks.unet.config import UNetConfig, head_channels, transformer_layers
from ddpm_engine.networks.unet.transformer import Text, TextTransformer


def attention_of_level(
    config: UNetConfig, level: int, kind: str, attend: Attend
) -> MakeAttention | None:
    """Say which attention follows the residual blocks of a level.

    Args:
        config: of the network.
        level: counted from the highest resolution.
        kind: type of its block.
        attend: the kernel.

    Returns:
        What makes one; None: the level does not attend.
    """
    width = config.block_out_channels[level]
    heads = width // head_channels(config, level)
    if kind.startswith("CrossAttn"):
        return _transformer(config, level, attend)
    if kind.startswith("Attn"):
        groups, eps = config.norm_num_groups, config.norm_eps
        return partial(Attention, width, heads, attend, groups, eps)
    return None


def attention_of_middle(config: UNetConfig, attend: Attend) -> MakeAttention:
    """Say which attention is between the residual blocks of the lowest resolution."""
    deepest = len(config.block_out_channels) - 1
    if config.cross_attention_dim is not None:
        return _transformer(config, deepest, attend)
    width = config.block_out_channels[deepest]
    groups = config.attn_norm_num_groups
    # By default, scale-and-shift networks have no norm here: a quirk of `UNet2DModel` that its
    # checkpoints depend on.
    if groups is None and config.resnet_time_scale_shift == "default":
        groups = config.norm_num_groups
    heads = width // head_channels(config, deepest)
    divisor = config.mid_block_scale_factor
    return partial(Attention, width, heads, attend, groups, config.norm_eps, divisor)


def _transformer(config: UNetConfig, level: int, attend: Attend) -> MakeAttention:
    width = config.block_out_channels[level]
    assert config.cross_attention_dim is not None, "checked with the shape"
    return partial(
        TextTransformer,
        width,
        config.cross_attention_dim,
        heads=width // head_channels(config, level),
        layers=transformer_layers(config, level),
        groups=config.norm_num_groups,
        attend=attend,
        linear=config.use_linear_projection,
    )


def transformers(levels: Iterable[nn.Module]) -> list[TextTransformer]:
    """Return the transformers of some levels, in the order of their use."""
    attentions = (each for level in levels for each in cast(Any, level).attentions)
    return [each for each in attentions if isinstance(each, TextTransformer)]


def number_projections(levels: Iterable[nn.Module]) -> None:
    """Give each transformer its place in `Conditioning.text_projections`; all levels are given."""
    first = 0
    for each in transformers(levels):
        each.first_projection = first
        first += each.projected_channels


def projections(levels: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Compute the keys and values of all transformers.

    Args:
        levels: all of a network.
        tokens: `[B, L, D]`.

    Returns:
        `[B, L, K]`, which `texts` takes the parts of.
    """
    layers = [layer for each in transformers(levels) for layer in each.projections]
    return torch.cat([layer(tokens) for layer in layers], dim=2)


def texts(
    levels: Iterable[nn.Module], tokens: Tensor | None, conditioning: Conditioning
) -> Iterator[Text | None]:
    """Return what the attention after each residual block attends to, besides its own map.

    Args:
        levels: some of a network, in the order of their use.
        tokens: `[B, L, D]`; None: `text_projections` are given.
        conditioning: the mask, and those.
    """
    mask, projected = conditioning.text_mask, conditioning.text_projections
    for level in levels:
        for _, attention in zip_longest(cast(Any, level).resnets, cast(Any, level).attentions):
            if not isinstance(attention, TextTransformer):
                yield None
            elif tokens is not None:
                yield Text(tokens, None, mask)
            else:
                assert projected is not None
                first = attention.first_projection
                own = projected[:, :, first : first + attention.projected_channels]
                yield Text(None, own, mask)
