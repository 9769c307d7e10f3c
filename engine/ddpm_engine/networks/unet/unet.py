"""The U-Net of denoising diffusion probabilistic models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.attention import choose_attention
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.embeddings import TimestepMLP, sinusoidal_embedding
from ddpm_engine.networks.given import check_given
from ddpm_engine.networks.stored import StoredNetwork
from ddpm_engine.networks.unet.attending import (
    attention_of_level,
    attention_of_middle,
    number_projections,
    projections,
    texts,
    transformers,
)
from ddpm_engine.networks.unet.blocks import (
    Condition,
    DownLevel,
    Middle,
    UpLevel,
    embedding_channels,
    project_embedding,
)
from ddpm_engine.networks.unet.config import UNetConfig, attending, check_shape
from ddpm_engine.networks.unet.dropout import keys_of_layers
from ddpm_engine.networks.unet.features import Features, convolve
from ddpm_engine.networks.unet.files import FORMAT
from ddpm_engine.networks.unet.norm import GroupNorm
from ddpm_engine.networks.unet.transformer import Text
from ddpm_engine.sizes import as_text, height_and_width
from ddpm_kernels.dispatch import takes_op


def _memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and activations: what tensor cores want, and what CPUs want.

    A CPU convolves in either; its GroupNorm is careful, and several times faster, in this one only.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


_ENDS_BRANCH = re.compile(r"\.(conv2|attentions\.\d+\.to_out\.0|proj_out)\.weight$")


class UNet(StoredNetwork):
    """The network that predicts noise (or x0, or v) from a noisy image and its timestep.

    Parameters carry the names of diffusers' `UNet2DModel`, or `UNet2DConditionModel` if it attends
    to text, so state dicts load both ways; only the vector's embedding has its own. Weights
    and activations are channels-last, the layout that convolutions on tensor cores want, except on
    a CPU. On a GPU the forward pass neither waits for the device nor looks at values, so it can be
    captured in a CUDA graph.

    Args:
        config: the shape, and which attention kernel to use; chosen here once.

    Raises:
        UserError: a shape that cannot be built, or an attention kernel that cannot serve.

    Source: Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, appendix B; class
    conditioning and scale-and-shift norms as in Dhariwal & Nichol, "Diffusion Models Beat GANs on
    Image Synthesis", 2021; low-resolution conditioning as in Ho et al., "Cascaded Diffusion Models
    for High Fidelity Image Generation", 2022; text as in Rombach et al., "High-Resolution Image
    Synthesis with Latent Diffusion Models", 2022.
    """

    config: UNetConfig
    caches_features = True
    format = FORMAT

    def __init__(self, config: UNetConfig) -> None:
        check_shape(config)
        super().__init__(config)
        widths = config.block_out_channels
        deepest = len(widths) - 1
        attend = choose_attention(
            config.attention,
            sorted({head for _, head in attending(config)}),
            masked=config.cross_attention_dim is not None,
        )

        shown = config.in_channels * (1 if config.low_resolution is None else 2)
        self.conv_in = nn.Conv2d(shown, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], embedding_channels(config))
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, embedding_channels(config))
            if config.num_class_embeds
            else None
        )
        self.augmentation_embedding = (
            None
            if config.low_resolution is None
            else TimestepMLP(widths[0], embedding_channels(config))
        )
        self.vector_embedding = (
            None
            if config.vector_channels is None
            else TimestepMLP(config.vector_channels, embedding_channels(config))
        )
        self.encoder_hid_proj = (
            nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
            if config.encoder_hid_dim is not None and config.cross_attention_dim is not None
            else None
        )

        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for index, down_type in enumerate(config.down_block_types):
            below, width, last = width, widths[index], index == deepest
            attention = attention_of_level(config, index, down_type, attend)
            self.down_blocks.append(DownLevel(below, width, config, attention, last))
            skips += [width] * (config.layers_per_block + (not last))

        self.mid_block = Middle(width, config, attention_of_middle(config, attend))

        self.up_blocks = nn.ModuleList()
        for index, up_type in enumerate(config.up_block_types):
            below, width, last = width, widths[deepest - index], index == deepest
            attention = attention_of_level(config, deepest - index, up_type, attend)
            used = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpLevel(below, used, width, config, attention, last))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        number_projections(self._levels())
        self._initialise()
        self._lay_out()

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        conditioning: Conditioning | None = None,
        *,
        features: Tensor | None = None,
        return_features: bool = False,
    ) -> Any:
        """Predict.

        Args:
            x: `[B, in_channels, H, W]`, float, any memory format; H and W multiples of
                `downscale_factor`. It is cast to the precision of the weights.
            noise_level: `[B]` or 0-dim, integer or float, on the device of `x`: usually timesteps.
            conditioning: `labels` if and only if the network is class-conditional, where the null
                class gives an unconditional prediction; `low_resolution`, `[B, in_channels, H, W]`,
                and `augmentation_level` if and only if it was built for super-resolution; `text`,
                or the `text_projections` that `precompute` gives, if and only if it attends to
                text; `vector` if and only if it was built for one; `dropout_key` in training mode,
                if it drops out activations.
            features: input of the last level on the way up, `[B, C, H, W]`, as returned by an
                evaluation close by. All deeper levels are then skipped (Ma, Fang & Wang,
                "DeepCache", 2024).
            return_features: return these features as well.

        Returns:
            `[B, out_channels, H, W]` in the precision the network ran in, channels-last except on
            a CPU; with `return_features`, that and the features.

        Raises:
            ValueError: H or W cannot be halved often enough, or conditions are missing or not ones
                that the network was built for.
        """
        if x.shape[2] % self.downscale_factor or x.shape[3] % self.downscale_factor:
            raise ValueError(
                f"x is {x.shape[2]}×{x.shape[3]} pixels; this U-Net of {len(self.down_blocks)} "
                f"levels needs multiples of {self.downscale_factor}"
            )
        conditioning = conditioning or Conditioning()
        low_resolution = conditioning.low_resolution
        given = low_resolution is not None, conditioning.augmentation_level is not None
        size = self.config.low_resolution
        if given != (size is not None, size is not None):
            raise ValueError(
                "low_resolution or augmentation_level is given, but this U-Net was built without"
                if size is None
                else f"this U-Net needs low-resolution images of {as_text(size)} pixels: give "
                "low_resolution, [B, C, H, W], and augmentation_level, [B]"
            )
        others = replace(conditioning, low_resolution=None, augmentation_level=None)
        check_given(others, self.conditioning, "U-Net")
        tokens = self._tokens(conditioning)
        embedding = self._embed(noise_level.expand(x.shape[0]), conditioning)
        if low_resolution is not None:
            x = torch.cat([x, low_resolution.to(x.dtype)], dim=1)
        x = x.to(self.conv_in.weight.dtype, memory_format=_memory_format(x.device))

        shallow = features is not None
        down = self.down_blocks[:1] if shallow else self.down_blocks
        up = self.up_blocks[-1:] if shallow else self.up_blocks
        levels = [*down, *up] if shallow else [*down, self.mid_block, *up]
        conditions = self._conditions(levels, embedding, tokens, conditioning)

        skips = [convolve(self.conv_in, x)]
        for level in down:
            skips += level(skips[-1], conditions, downsample=not shallow)
        if features is None:
            deep = self.mid_block(skips[-1], conditions)
            for level in up[:-1]:
                # Each gets its own: what wraps modules to shard them copies lists of arguments.
                used = self.config.layers_per_block + 1
                deep = level(deep, skips[-used:], conditions)
                del skips[-used:]
        else:
            deep = Features(features)
        if return_features:
            deep = deep.settled()
        h, _ = self.conv_norm_out(up[-1](deep, skips, conditions))
        prediction = convolve(self.conv_out, h).settled().map
        return (prediction, deep.map) if return_features else prediction

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """Compute keys and values of the text once for all noise levels; see `Network`."""
        levels = self._levels()
        found, tokens = transformers(levels), None
        # Weights that are gathered module by module are not at hand here.
        if found and not any(each.separate for each in found):
            tokens = self._tokens(conditioning)
        if tokens is None:
            return conditioning
        return replace(conditioning, text=None, text_projections=projections(levels, tokens))

    @property
    def downscale_factor(self) -> int:
        """How many pixels of the image's side become one at the lowest resolution."""
        return int(2 ** (len(self.down_blocks) - 1))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images the network was made for."""
        return self.config.in_channels, *height_and_width(self.config.sample_size)

    @property
    def conditioning(self) -> ConditioningSpec:
        """The conditions that the network was built for; the last class embedding is the null's."""
        embeddings = self.config.num_class_embeds
        classes = None if embeddings is None else embeddings - 1
        return ConditioningSpec(
            classes,
            self.config.low_resolution,
            self.config.text_channels,
            self.config.vector_channels,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the residual and attention blocks, in the order of their use."""
        return [
            block
            for level in self._levels()
            for layer in zip_longest(level.resnets, level.attentions)
            for block in layer
            if block is not None
        ]

    def _levels(self) -> list[Any]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def _apply(self, fn: Any, recurse: bool = True) -> UNet:
        """What `to`, `cuda` and the like do; another device may want another memory format."""
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(
                    memory_format=_memory_format(parameter.device)
                )

    def _sinusoids(self, levels: Tensor) -> Tensor:
        return sinusoidal_embedding(
            levels,
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        ).to(self.conv_in.weight.dtype)

    def _embed(self, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        """Embed noise levels, `[B]`, labels and augmentation levels: `[B, E]`, SiLU taken."""
        embedding: Tensor = self.time_embedding(self._sinusoids(noise_level))
        labels, level = conditioning.labels, conditioning.augmentation_level
        if self.class_embedding is not None:
            assert labels is not None, "checked by `check_given`"
            embedding = embedding + self.class_embedding(labels).to(embedding.dtype)
        if self.augmentation_embedding is not None and level is not None:
            embedding = embedding + self.augmentation_embedding(self._sinusoids(level))
        vector = conditioning.vector
        if self.vector_embedding is not None:
            assert vector is not None
            embedding = embedding + self.vector_embedding(vector.to(self.conv_in.weight.dtype))
        # Every residual block begins by taking the SiLU of the embedding, so it is taken once.
        return F.silu(embedding)

    def _tokens(self, conditioning: Conditioning) -> Tensor | None:
        """The text's tokens as the transformers take them, `[B, L, D]`; None: there are none.

        There are none, either, if projections are given in their place.
        """
        text = conditioning.text
        if text is None:
            return None
        text = text.to(self.conv_in.weight.dtype)
        return text if self.encoder_hid_proj is None else self.encoder_hid_proj(text)

    def _conditions(
        self,
        levels: Iterable[nn.Module],
        embedding: Tensor,
        tokens: Tensor | None,
        conditioning: Conditioning,
    ) -> Iterator[Condition]:
        """The condition of each residual block of some levels, in the order of their use."""
        blocks = [block for level in levels for block in cast(Any, level).resnets]
        together = takes_op(embedding) and not any(block.separate for block in blocks)
        projected = project_embedding(blocks, embedding) if together else [None] * len(blocks)
        key = conditioning.dropout_key
        keys: Sequence[Tensor | None] = [key] * len(blocks)
        if key is not None and self.training and self.config.dropout > 0:
            keys = keys_of_layers(key, len(blocks))
        attended: Iterable[Text | None] = [None] * len(blocks)
        if self.config.cross_attention_dim is not None:
            attended = texts(levels, tokens, conditioning)
        for each, own_key, text in zip(projected, keys, attended, strict=True):
            yield Condition(embedding, each, own_key, text)

    def _initialise(self) -> None:
        """Initialise as the paper's code: variance scaling, fan average, uniform; no biases."""
        for name, parameter in self.named_parameters():
            # What ends a residual branch starts at zero, so that every block starts as its shortcut
            # and depth amplifies nothing. So does the output: the first prediction is zero, the
            # mean of the noise, and the first loss exactly the noise's variance.
            # In a transformer it is the projection behind all blocks, and no branch within.
            if name == "conv_out.weight" or _ENDS_BRANCH.search(name):
                nn.init.zeros_(parameter)
            elif name == "class_embedding.weight":
                nn.init.normal_(parameter)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
