"""What the prior is made of: attention to the text and a feed-forward part, modulated."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.base import Recomputed
from ddpm_engine.networks.modulated_norm import ModulatedNorm, Stream
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.text_attention import CrossAttention, Text


class FeedForward(nn.Module):
    """Two linear layers, GELU between them: `[B, 1, C]` → same shape."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.channels, config.hidden_channels)
        self.linear_2 = nn.Linear(config.hidden_channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to `[B, 1, C]`."""
        y: Tensor = self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))
        return y


class Block(Recomputed):
    """Attention to the text, if there is one, and a feed-forward part, each with its residual."""

    def __init__(self, config: PriorConfig, attend: Attend) -> None:
        super().__init__()
        channels, attends = config.channels, config.text_channels is not None
        self.modulation = nn.Linear(channels, (6 if attends else 3) * channels)
        self.norm1 = ModulatedNorm(channels) if attends else None
        self.attn = (
            CrossAttention(channels, config.num_attention_heads, attend) if attends else None
        )
        self.norm2 = ModulatedNorm(channels)
        self.ff = FeedForward(config)

    def forward(self, stream: Stream, embedding: Tensor, text: Text | None) -> Stream:
        """Apply the block.

        Args:
            stream: see `Stream`.
            embedding: of noise level, class and vector, `[B, C]`, its SiLU taken.
            text: exactly if the network has one.
        """
        return self.run(self._layers, *stream, embedding, text)

    def _layers(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        embedding: Tensor,
        text: Text | None,
    ) -> Stream:
        shift, scale, next_gate, *attention = self.modulation(embedding).chunk(
            3 if self.attn is None else 6, dim=1
        )
        if self.norm1 is not None and self.attn is not None and text is not None:
            attention_shift, attention_scale, attention_gate = attention
            x, h = self.norm1((x, y, gate), attention_scale, attention_shift)
            y, gate = self.attn(h, text), attention_gate
        x, h = self.norm2((x, y, gate), scale, shift)
        return x, self.ff(h), next_gate
