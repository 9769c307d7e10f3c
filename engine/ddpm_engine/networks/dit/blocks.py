"""What the transformer is made of: attention and feed-forward part, modulated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.base import Recomputed
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.dit.positions import Rotation, rotate
from ddpm_engine.networks.linear import apply_together
from ddpm_engine.networks.modulated_norm import EPS, ModulatedNorm, Stream
from ddpm_engine.networks.text_attention import AttendsToText, CrossAttention, HeadNorm, Text


class AdaNorm(nn.Module):
    """The first norm of a block, and all modulations of the block: three for each branch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        branches = 3 if config.crosses else 2
        self.linear = nn.Linear(config.channels, 3 * branches * config.channels)
        self.norm = ModulatedNorm(config.channels, config.norm)


class Attention(AttendsToText):
    """Multi-head self-attention: `[B, L, C]` → same shape.

    Joint with a text, its tokens are further keys and values, by layers of their own.

    Source: Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with
    Text-Guided Diffusion Models", 2021 (the text as further keys and values).
    """

    def __init__(self, config: DiTConfig, attend: Attend) -> None:
        super().__init__()
        channels, head = config.channels, config.attention_head_dim
        self.heads, self.attend = config.num_attention_heads, attend
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.norm_q = HeadNorm(head, EPS) if config.qk_norm else None
        self.norm_k = HeadNorm(head, EPS) if config.qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        joint = config.text_channels is not None and not config.crosses
        self.add_k_proj = nn.Linear(channels, channels) if joint else None
        self.add_v_proj = nn.Linear(channels, channels) if joint else None

    def text_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the layers that make keys and values of the text's tokens."""
        assert self.add_k_proj is not None, "a joint attention"
        assert self.add_v_proj is not None, "a joint attention"
        return self.add_k_proj, self.add_v_proj

    def forward(self, x: Tensor, by: Rotation | None, text: Text | None = None) -> Tensor:
        """Let every token of `[B, L, C]` attend to every token, and to those of a joint text."""
        query, key, value = (
            projected.unflatten(2, (self.heads, -1))
            for projected in apply_together([self.to_q, self.to_k, self.to_v], x)
        )
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if by is not None:
            query, key = rotate(query, by), rotate(key, by)
        mask = None
        if text is not None:
            text_key, text_value = self.keys_and_values(text)
            key = torch.cat([key, text_key.to(key.dtype)], dim=1)
            value = torch.cat([value, text_value.to(value.dtype)], dim=1)
            if text.mask is not None:
                mask = torch.cat([text.mask.new_ones(x.shape[:2]), text.mask], dim=1)
        y: Tensor = self.to_out[0](self.attend(query, key, value, mask).flatten(2))
        return y


class Activation(nn.Module):
    """The first half of a feed-forward part: `[B, L, C]` → `[B, L, hidden]`.

    Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve
    Transformer", 2020 (SwiGLU).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        hidden = config.hidden_channels
        self.proj = nn.Linear(config.channels, 2 * hidden if self.gated else hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, L, C]` and apply the activation."""
        hidden: Tensor = self.proj(x)
        if self.gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            return hidden * F.silu(gate)
        return F.gelu(hidden, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: `[B, L, C]` → same shape."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        # Between the two diffusers has a dropout, whose place keeps its number.
        last = nn.Linear(config.hidden_channels, config.channels)
        self.net = nn.ModuleList([Activation(config), nn.Identity(), last])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to every token of `[B, L, C]`."""
        for layer in self.net:
            x = layer(x)
        return x


class Block(Recomputed):
    """Attention and a feed-forward part, each modulated, each with a residual connection.

    Between the two, in networks with cross attention, there is one to the text, modulated as well.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023; Chen et al.,
    "PixArt-α", 2023 (where cross attention is).
    """

    def __init__(self, config: DiTConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1 = AdaNorm(config)
        self.attn1 = Attention(config, attend)
        self.norm2 = ModulatedNorm(config.channels, config.norm) if config.crosses else None
        self.attn2 = (
            CrossAttention(config.channels, config.num_attention_heads, attend, config.qk_norm, EPS)
            if config.crosses
            else None
        )
        self.norm3 = ModulatedNorm(config.channels, config.norm, config.norm_eps)
        self.ff = FeedForward(config)

    @property
    def text_attention(self) -> AttendsToText:
        """The attention that the text of a network with one is given to."""
        return self.attn1 if self.attn2 is None else self.attn2

    def forward(
        self, stream: Stream, embedding: Tensor, by: Rotation | None, text: Text | None = None
    ) -> Stream:
        """Apply the block.

        Args:
            stream: see `Stream`.
            embedding: of noise level, class and vector, `[B, C]`, its SiLU taken.
            by: rotation of queries and keys, or None.
            text: exactly if the network has one.
        """
        return self.run(self._layers, *stream, embedding, by, text)

    def _layers(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        embedding: Tensor,
        by: Rotation | None,
        text: Text | None,
    ) -> Stream:
        modulations = self.norm1.linear(embedding).chunk(6 if self.attn2 is None else 9, dim=1)
        shift, scale, gate_1, ff_shift, ff_scale, ff_gate, *cross = modulations
        x, h = self.norm1.norm((x, y, gate), scale, shift)
        if self.attn2 is None or self.norm2 is None or text is None:
            y, gate = self.attn1(h, by, text), gate_1
        else:
            cross_shift, cross_scale, cross_gate = cross
            x, h = self.norm2((x, self.attn1(h, by), gate_1), cross_scale, cross_shift)
            y, gate = self.attn2(h, text), cross_gate
        x, h = self.norm3((x, y, gate), ff_scale, ff_shift)
        return x, self.ff(h), ff_gate
