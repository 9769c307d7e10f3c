"""Transformers over the pixels of a feature map, which attend to a text as well."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.linear import apply_together, split_bias
from ddpm_engine.networks.recipes import keeping_recipe
from ddpm_engine.networks.unet.features import Features, residual
from ddpm_engine.networks.unet.norm import GroupNorm

_GROUP_EPS = 1e-6
_LAYER_EPS = 1e-5


class Text(NamedTuple):
    """The text that a transformer attends to: its tokens, or what it makes of them."""

    tokens: Tensor | None
    """`[B, L, D]`."""
    projections: Tensor | None
    """`[B, L, K]`, keys and values of each block in turn; see `TextTransformer.projections`."""
    mask: Tensor | None
    """bool `[B, L]`, False for padding; None: all tokens count."""


class Attention(nn.Module):
    """Multi-head attention of pixels to pixels, or to the tokens of a text.

    Args:
        channels: C, of the pixels.
        context: D, channels of what they attend to.
        heads: their number, a divisor of C.
        attend: the kernel, from `choose_attention`.
    """

    def __init__(self, channels: int, context: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def to_pixels(self, x: Tensor) -> Tensor:
        """Let every pixel of `[B, HW, C]` attend to every pixel; D is C."""
        query, key, value = apply_together((self.to_q, self.to_k, self.to_v), x)
        return self._attended(query, key, value, None)

    def to_text(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Let every pixel attend to a text's tokens.

        Args:
            x: `[B, HW, C]`.
            key: `[B, L, C]`.
            value: likewise.
            mask: bool `[B, L]`; see `Text`.

        Returns:
            `[B, HW, C]`.
        """
        query = self.to_q(x)
        return self._attended(query, key.to(query.dtype), value.to(query.dtype), mask)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (one.unflatten(2, (self.heads, -1)) for one in (query, key, value))
        y: Tensor = self.to_out[0](self.attend(query, key, value, mask).flatten(2))
        return y


class GatedGELU(nn.Module):
    """The first half of a feed-forward part: `[B, L, C]` → `[B, L, hidden]`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020 (GEGLU).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, L, C]`, and let one half be the other's gate."""
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return cast(Tensor, hidden * F.gelu(gate))


class FeedForward(nn.Module):
    """Two linear layers with a gated activation between them: `[B, L, C]` → same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        # Between the two diffusers has a dropout, whose place keeps its number.
        last = nn.Linear(hidden, channels)
        self.net = nn.ModuleList([GatedGELU(channels, hidden), nn.Identity(), last])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to every token of `[B, L, C]`."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward part, each after a LayerNorm.

    Args:
        channels: C, of the pixels.
        context: D, channels of the text's tokens.
        heads: attention heads.
        attend: the kernel, from `choose_attention`.
    """

    def __init__(self, channels: int, context: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, _LAYER_EPS)
        self.attn1 = Attention(channels, channels, heads, attend)
        self.norm2 = nn.LayerNorm(channels, _LAYER_EPS)
        self.attn2 = Attention(channels, context, heads, attend)
        self.norm3 = nn.LayerNorm(channels, _LAYER_EPS)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the block to `[B, HW, C]`; key and value are the text's, `[B, L, C]`."""
        x = x + self.attn1.to_pixels(self.norm1(x))
        x = x + self.attn2.to_text(self.norm2(x), key, value, mask)
        y: Tensor = x + self.ff(self.norm3(x))
        return y


class TextTransformer(nn.Module):
    """Transformer blocks with a residual connection around all: `[B, C, H, W]` → same shape.

    Parameters carry the names of diffusers' `Transformer2DModel`.

    Args:
        channels: C.
        context: D, channels of the text's tokens.
        heads: attention heads.
        layers: number of blocks.
        groups: of the GroupNorm that comes first.
        attend: the kernel, from `choose_attention`.
        linear: whether linear layers surround the blocks, instead of 1×1 convolutions.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022.
    """

    separate: bool = False
    """See `Network.separate_blocks`."""
    first_projection: int = 0
    """Where in `Conditioning.text_projections` its own begin."""

    def __init__(
        self,
        channels: int,
        context: int,
        *,
        heads: int,
        layers: int,
        groups: int,
        attend: Attend,
        linear: bool,
    ) -> None:
        super().__init__()
        self.projected_channels = 2 * layers * channels
        self.norm = GroupNorm(groups, channels, _GROUP_EPS, "none")
        self.proj_in = _projection(channels, linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context, heads, attend) for _ in range(layers)
        )
        self.proj_out = _projection(channels, linear)

    @property
    def projections(self) -> list[nn.Linear]:
        """The layers that make keys and values of a text, in the order of `Text.projections`."""
        blocks = cast("list[TransformerBlock]", list(self.transformer_blocks))
        return [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]

    def forward(self, x: Features, text: Text) -> Features:
        """Let every pixel attend to every pixel and to the text: `[B, C, H, W]` to the same."""
        h, (x,) = self.norm(x)
        layers = self.projections
        if text.tokens is not None:
            projected = apply_together(layers, text.tokens)
        else:
            assert text.projections is not None
            projected = text.projections.split([layer.out_features for layer in layers], dim=2)
        tokens = self._entered(h)
        for index, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, projected[2 * index], projected[2 * index + 1], text.mask)
        h, bias = self._left(tokens, x.map.shape[2:])
        return residual(h, x.map, bias, settled=self.separate)

    def _entered(self, h: Tensor) -> Tensor:
        """From a map, `[B, C, H, W]`, to the tokens of its pixels, `[B, HW, C]`."""
        # A channels-last map is already [B, HW, C] in memory: the reshape is a view. Of others, a
        # CPU's, this copies once what each norm would copy for itself.
        with keeping_recipe(h):
            if isinstance(self.proj_in, nn.Conv2d):
                return cast(Tensor, self.proj_in(h)).flatten(2).transpose(1, 2).contiguous()
            return cast(Tensor, self.proj_in(h.flatten(2).transpose(1, 2)))

    def _left(self, tokens: Tensor, pixels: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Back to a map, and the bias that is still to be added."""
        if isinstance(self.proj_out, nn.Conv2d):
            return split_bias(self.proj_out, tokens.transpose(1, 2).unflatten(2, pixels))
        h, bias = split_bias(self.proj_out, tokens)
        return h.transpose(1, 2).unflatten(2, pixels), bias


def _projection(channels: int, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
