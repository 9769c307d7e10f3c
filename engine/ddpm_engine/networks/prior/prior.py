"""The prior."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ddpm_engine.networks.attention import choose_attention
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.condition_embedding import ConditionEmbedding
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.given import check_given
from ddpm_engine.networks.modulated_norm import ModulatedNorm, Stream
from ddpm_engine.networks.prior.blocks import Block
from ddpm_engine.networks.prior.config import PriorConfig, check_shape
from ddpm_engine.networks.text_attention import (
    CrossAttention,
    TextProjection,
    precompute_text,
    text_of_each,
)


class Prior(Network):
    """A residual network over noisy vectors, whose blocks attend to the tokens of a text.

    Noise level, class and vector modulate the blocks as those of the transformer. diffusers has no
    such network: its `PriorTransformer` is a transformer over text, noise level and vector.

    Args:
        config: the shape, and which attention kernel to use; chosen here once.

    Raises:
        UserError: a shape that cannot be built, or an attention kernel that cannot serve.

    Source: Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022
    (the diffusion prior); Li et al., "Autoregressive Image Generation without Vector Quantization",
    2024 (vectors denoised by modulated residual blocks).
    """

    config: PriorConfig

    def __init__(self, config: PriorConfig) -> None:
        check_shape(config)
        super().__init__()
        self.config = config
        channels, text = config.channels, config.text_channels
        attend = choose_attention(
            config.attention if text else "sdpa", [config.attention_head_dim], masked=True
        )
        self.proj_in = nn.Linear(config.in_channels, channels)
        self.embedding = ConditionEmbedding(
            channels, config.num_class_embeds, config.vector_channels
        )
        self.text_projection = None if text is None else TextProjection(text, channels)
        self.layers = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.norm_out = ModulatedNorm(channels)
        self.modulation_out = nn.Linear(channels, 2 * channels)
        self.proj_out = nn.Linear(channels, config.out_channels)
        self._initialise()

    def forward(
        self, x: Tensor, noise_level: Tensor, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Predict.

        Args:
            x: `[B, in_channels, 1, 1]`, float.
            noise_level: `[B]` or 0-dim, integer or float, on the device of `x`.
            conditioning: labels, text and vector, each exactly if the network has it; of the text
                also what `precompute` makes of it.

        Returns:
            `[B, out_channels, 1, 1]`.

        Raises:
            ValueError: images of more than one pixel, or conditions are missing or not ones that
                the network was built for.
        """
        if x.shape[2:] != (1, 1):
            raise ValueError(
                f"x is {x.shape[2]}×{x.shape[3]} pixels; a prior takes vectors, [B, C, 1, 1]"
            )
        conditioning = conditioning or Conditioning()
        check_given(conditioning, self.conditioning, "prior")
        embedding = self.embedding(noise_level.expand(len(x)), conditioning)
        texts = (
            [None] * len(self.layers)
            if self.text_projection is None
            else text_of_each(len(self.layers), self.text_projection, conditioning)
        )
        tokens = self.proj_in(x.flatten(1).to(self.proj_in.weight.dtype))[:, None]
        stream: Stream = tokens, None, None
        for layer, text in zip(self.layers, texts, strict=True):
            stream = layer(stream, embedding, text)
        shift, scale = self.modulation_out(embedding).chunk(2, dim=1)
        _, h = self.norm_out(stream, scale, shift)
        prediction: Tensor = self.proj_out(h)[:, 0, :, None, None]
        return prediction

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """Compute the keys and values of the text for all blocks; see `Network.precompute`."""
        if self.text_projection is None or self.separated:
            return conditioning
        attentions = [cast(CrossAttention, cast(Block, layer).attn) for layer in self.layers]
        return precompute_text(attentions, self.text_projection, conditioning)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, 1, 1)`: a vector is an image of one pixel."""
        return self.config.in_channels, 1, 1

    @property
    def conditioning(self) -> ConditioningSpec:
        """The conditions that the network was built for; the last class embedding is the null's."""
        embeddings = self.config.num_class_embeds
        return ConditioningSpec(
            classes=None if embeddings is None else embeddings - 1,
            text=self.config.text_channels,
            vector=self.config.vector_channels,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, in the order of their use."""
        return list(self.layers)

    def _initialise(self) -> None:
        """Initialise as the transformer: every block starts as the identity, the output as zero."""
        if self.proj_in.weight.is_meta:
            return  # random numbers without values would first import torch's compiler
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("proj_out") or name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("embedding."):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
