"""The U-Net of denoising diffusion probabilistic models."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.base import Network
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.files.hub import local_folder
from ddpm_engine.networks.files.layout import find_layout
from ddpm_engine.networks.files.weights import check_tensors
from ddpm_engine.networks.unet.attention import choose_attention
from ddpm_engine.networks.unet.blocks import (
    DownLevel,
    Middle,
    UpLevel,
    embedding_channels,
)
from ddpm_engine.networks.unet.config import UNetConfig, attending_channels, check_shape
from ddpm_engine.networks.unet.embeddings import TimestepMLP, sinusoidal_embedding
from ddpm_engine.networks.unet.files import StoredUNet, read_unet, write_unet
from ddpm_engine.networks.unet.norm import GroupNorm


def _memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and activations: what tensor cores want, and what CPUs want.

    A CPU convolves in either; its GroupNorm is careful, and several times faster, in this one only.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


class UNet(Network):
    """The network that predicts noise (or x0, or v) from a noisy image and its timestep.

    Parameters carry the names of diffusers' `UNet2DModel`, so state dicts load both ways. Weights
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
    for High Fidelity Image Generation", 2022.
    """

    config: UNetConfig
    caches_features = True

    def __init__(self, config: UNetConfig) -> None:
        check_shape(config)
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        deepest = len(widths) - 1
        head_dims = {config.attention_head_dim or width for width in attending_channels(config)}
        attend = choose_attention(config.attention, head_dims)

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

        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for index, down_type in enumerate(config.down_block_types):
            below, width, last = width, widths[index], index == deepest
            attends = attend if down_type == "AttnDownBlock2D" else None
            self.down_blocks.append(DownLevel(below, width, config, attends, last))
            skips += [width] * (config.layers_per_block + (not last))

        self.mid_block = Middle(width, config, attend)

        self.up_blocks = nn.ModuleList()
        for index, up_type in enumerate(config.up_block_types):
            below, width, last = width, widths[deepest - index], index == deepest
            attends = attend if up_type == "AttnUpBlock2D" else None
            used = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpLevel(below, used, width, config, attends, last))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
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
                and `augmentation_level` if and only if it was built for super-resolution.
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
        side = self.config.low_resolution
        if given != (side is not None, side is not None):
            raise ValueError(
                "low_resolution or augmentation_level is given, but this U-Net was built without"
                if side is None
                else f"this U-Net needs low-resolution images of side {side}: give "
                "low_resolution, [B, C, H, W], and augmentation_level, [B]"
            )
        embedding = self._embed(noise_level.expand(x.shape[0]), conditioning)
        if low_resolution is not None:
            x = torch.cat([x, low_resolution.to(x.dtype)], dim=1)
        x = x.to(self.conv_in.weight.dtype, memory_format=_memory_format(x.device))

        skips = [self.conv_in(x)]
        shallow = features is not None
        for level in self.down_blocks[:1] if shallow else self.down_blocks:
            skips += level(skips[-1], embedding, downsample=not shallow)
        if features is None:
            features = self.mid_block(skips[-1], embedding)
            for level in self.up_blocks[:-1]:
                # Each gets its own: what wraps modules to shard them copies lists of arguments.
                used = self.config.layers_per_block + 1
                features = level(features, skips[-used:], embedding)
                del skips[-used:]
        h = self.up_blocks[-1](features, skips, embedding)
        prediction = self.conv_out(self.conv_norm_out(h))
        return (prediction, features) if return_features else prediction

    @classmethod
    def from_pretrained(cls, path: Path | str) -> UNet:
        """Load a `UNet2DModel` as diffusers saves it: its folder, or that of its pipeline.

        Args:
            path: of the folder, or a name on the Hugging Face hub.

        Returns:
            The network in float32, on the CPU, in eval mode.

        Raises:
            UserError: nothing there, damaged, or a network that `UNet` cannot be; it says why.
        """
        folder = find_layout(local_folder(path)).network
        return cls.from_stored(read_unet(folder), folder)

    @classmethod
    def from_stored(cls, stored: StoredUNet, origin: Path) -> UNet:
        """Build a network with stored weights: float32, on the CPU, in eval mode.

        Args:
            stored: as `read_unet` returns it.
            origin: for messages.

        Raises:
            UserError: weights of another network.
        """
        with torch.device("meta"):  # no initial weights, which take seconds
            network = cls(stored.config)
        # Before memory is taken for a shape that the weights do not have.
        check_tensors(network, stored.tensors, origin)
        network.to_empty(device="cpu").load_state_dict(dict(stored.tensors))
        return network.eval()

    def save_pretrained(self, path: Path | str) -> None:
        """Save the network as diffusers saves a `UNet2DModel`.

        Args:
            path: of the folder, created if missing.

        Raises:
            UserError: diffusers has no such network.
            OSError: the folder cannot be written.
        """
        write_unet(Path(path), self.config, self.state_dict(), self.conditioning.null_class)

    @property
    def downscale_factor(self) -> int:
        """How many pixels of the image's side become one at the lowest resolution."""
        return int(2 ** (len(self.down_blocks) - 1))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images the network was made for."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @property
    def conditioning(self) -> ConditioningSpec:
        """The conditions that the network was built for; the last class embedding is the null's."""
        embeddings = self.config.num_class_embeds
        classes = None if embeddings is None else embeddings - 1
        return ConditioningSpec(classes, self.config.low_resolution)

    def blocks(self) -> list[nn.Module]:
        """Return the residual and attention blocks, in the order of their use."""
        return [
            block
            for level in (*self.down_blocks, self.mid_block, *self.up_blocks)
            for layer in zip_longest(level.resnets, level.attentions)
            for block in layer
            if block is not None
        ]

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
            if labels is None:
                raise ValueError(
                    "this U-Net is class-conditional: give labels, int64 [B]; the null class is "
                    f"{self.conditioning.null_class}"
                )
            embedding = embedding + self.class_embedding(labels).to(embedding.dtype)
        elif labels is not None:
            raise ValueError("labels given, but this U-Net is unconditional (num_class_embeds)")
        if self.augmentation_embedding is not None and level is not None:
            embedding = embedding + self.augmentation_embedding(self._sinusoids(level))
        # Every residual block begins by taking the SiLU of the embedding, so it is taken once.
        return F.silu(embedding)

    def _initialise(self) -> None:
        """Initialise as the paper's code: variance scaling, fan average, uniform; no biases."""
        for name, parameter in self.named_parameters():
            # What ends a residual branch starts at zero, so that every block starts as its shortcut
            # and depth amplifies nothing. So does the output: the first prediction is zero, the
            # mean of the noise, and the first loss exactly the noise's variance.
            if name.endswith((".conv2.weight", ".to_out.0.weight")) or name == "conv_out.weight":
                nn.init.zeros_(parameter)
            elif name == "class_embedding.weight":
                nn.init.normal_(parameter)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
