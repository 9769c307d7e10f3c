"""The diffusion transformer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ddpm_engine.networks.attention import choose_attention
from ddpm_engine.networks.condition_embedding import ConditionEmbedding
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.dit.blocks import Block
from ddpm_engine.networks.dit.config import DiTConfig, check_shape
from ddpm_engine.networks.dit.embeddings import PatchEmbedding, unpatched
from ddpm_engine.networks.dit.files import FORMAT
from ddpm_engine.networks.dit.positions import rotation, sinusoids
from ddpm_engine.networks.given import check_given
from ddpm_engine.networks.modulated_norm import ModulatedNorm, Stream
from ddpm_engine.networks.stored import StoredNetwork
from ddpm_engine.networks.text_attention import TextProjection, precompute_text, text_of_each
from ddpm_engine.sizes import height_and_width


class DiT(StoredNetwork):
    """A transformer over the patches of a noisy image, modulated by noise level, class and vector.

    A text is attended to by cross attention, or jointly with the patches.

    Parameters carry the names of diffusers' `DiTTransformer2DModel`, but for the embeddings of
    noise level and class: these are outside of the blocks, so that blocks are sharded one by one,
    and of networks of our own there is one. On a GPU the forward pass neither waits for the device
    nor looks at values, so it can be captured in a CUDA graph.

    Args:
        config: the shape, and which attention kernel to use; chosen here once.

    Raises:
        UserError: a shape that cannot be built, or an attention kernel that cannot serve.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023; RMSNorm, QK-norm,
    rotary positions, SwiGLU and the bottleneck as in Li & He, "Back to Basics: Let Denoising
    Generative Models Denoise", 2025 (JiT).
    """

    config: DiTConfig
    format = FORMAT

    def __init__(self, config: DiTConfig) -> None:
        check_shape(config)
        super().__init__(config)
        text = config.text_channels
        attend = choose_attention(
            config.attention, [config.attention_head_dim], masked=text is not None
        )
        self.pos_embed = PatchEmbedding(config)
        self.embeddings = nn.ModuleList(
            ConditionEmbedding(config.channels, config.num_class_embeds, config.vector_channels)
            for _ in range(1 if config.shared_embedding else config.num_layers)
        )
        self.caption_projection = None if text is None else TextProjection(text, config.channels)
        self.transformer_blocks = nn.ModuleList(
            Block(config, attend) for _ in range(config.num_layers)
        )
        self.norm_out = ModulatedNorm(config.channels, config.norm)
        self.proj_out_1 = nn.Linear(config.channels, 2 * config.channels)
        self.proj_out_2 = nn.Linear(config.channels, config.patch_size**2 * config.out_channels)
        self._initialise()

    def forward(
        self, x: Tensor, noise_level: Tensor, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Predict.

        Args:
            x: `[B, in_channels, H, W]`, float; H and W multiples of the patch's side.
            noise_level: `[B]` or 0-dim, integer or float, on the device of `x`.
            conditioning: labels, text and vector, each exactly if the network has it; of the text
                also what `precompute` makes of it.

        Returns:
            `[B, out_channels, H, W]`.

        Raises:
            ValueError: H or W is no multiple, or conditions are missing or not ones that the
                network was built for.
        """
        size = self.config.patch_size
        if x.shape[2] % size or x.shape[3] % size:
            raise ValueError(
                f"x is {x.shape[2]}×{x.shape[3]} pixels; this transformer's patches of "
                f"{size}×{size} need multiples of {size}"
            )
        conditioning = conditioning or Conditioning()
        check_given(conditioning, self.conditioning, "transformer")
        height, width = x.shape[2] // size, x.shape[3] // size
        grid = height, width, self.config.grid
        tokens = self.pos_embed(x.to(self.proj_out_2.weight.dtype))
        positions = sinusoids(*grid, self.config.channels, x.device)
        by = (
            rotation(*grid, self.config.attention_head_dim, x.device)
            if self.config.rotary
            else None
        )
        levels = noise_level.expand(len(x))
        embedded = [embedding(levels, conditioning) for embedding in self.embeddings]
        texts = (
            [None] * len(self.transformer_blocks)
            if self.caption_projection is None
            else text_of_each(len(self.transformer_blocks), self.caption_projection, conditioning)
        )

        stream: Stream = (tokens + positions).to(tokens.dtype), None, None
        for index, (block, text) in enumerate(zip(self.transformer_blocks, texts, strict=True)):
            stream = block(stream, embedded[index % len(embedded)], by, text)
        shift, scale = self.proj_out_1(embedded[0]).chunk(2, dim=1)
        _, h = self.norm_out(stream, scale, shift)
        return unpatched(self.proj_out_2(h), height, width, size)

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """Compute the keys and values of the text for all blocks; see `Network.precompute`."""
        if self.caption_projection is None or self.separated:
            return conditioning
        attentions = [cast(Block, block).text_attention for block in self.transformer_blocks]
        return precompute_text(attentions, self.caption_projection, conditioning)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images or latents the network was made for."""
        return self.config.in_channels, *height_and_width(self.config.sample_size)

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
        return list(self.transformer_blocks)

    def _initialise(self) -> None:
        """Initialise as DiT's code: every block starts as the identity, the output as zero."""
        if self.proj_out_1.weight.is_meta:
            return  # random numbers without values would first import torch's compiler
        for name, parameter in self.named_parameters():
            if name.startswith("proj_out") or ".norm1.linear." in name or name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("embeddings."):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter.data.flatten(1))
