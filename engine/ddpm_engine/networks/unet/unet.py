"""The U-Net of denoising diffusion probabilistic models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.attention import Attention, choose_attention
from ddpm_engine.networks.unet.blocks import (
    Checkpointed,
    DownLevel,
    Middle,
    ResidualBlock,
    UpLevel,
    embedding_channels,
)
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.embeddings import TimestepMLP, sinusoidal_embedding
from ddpm_engine.networks.unet.norm import GroupNorm


def check_shape(config: UNetConfig) -> None:
    """Check that a U-Net of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    problems: list[str] = []

    def check(right: bool, problem: str) -> None:
        if not right:
            problems.append(problem)

    def check_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
        listed = " or ".join(map(repr, choices))
        check(value in choices, f"{field} is {value!r}: it must be {listed}")

    channels, groups, head = (
        config.block_out_channels,
        config.norm_num_groups,
        config.attention_head_dim,
    )
    for field in ("sample_size", "in_channels", "out_channels", "layers_per_block"):
        value = getattr(config, field)
        check(value >= 1, f"{field} is {value}: it must be at least 1")
    check(groups >= 1, f"norm_num_groups is {groups}: it must be at least 1")
    middle_groups = config.attn_norm_num_groups
    check(
        middle_groups is None
        or (middle_groups >= 1 and (not channels or channels[-1] % middle_groups == 0)),
        f"attn_norm_num_groups is {middle_groups}: it must divide the deepest level's channels, "
        f"block_out_channels[-1]; use None for the other norms' {groups}",
    )
    check(head is None or head >= 1, f"attention_head_dim is {head}: use None for one head")
    check(
        len(channels) >= 1 and min(channels, default=0) >= 1,
        f"block_out_channels is {channels}: give at least one level, of at least one channel",
    )
    classes = config.num_class_embeds
    check(classes is None or classes >= 1, f"num_class_embeds is {classes}: None for no classes")
    small = config.low_resolution
    check(
        small is None or (1 <= small < config.sample_size and config.sample_size % small == 0),
        f"low_resolution is {small}: it must divide sample_size={config.sample_size} and be less; "
        "use None for a network that is shown no small image",
    )
    check(0 <= config.dropout < 1, f"dropout is {config.dropout}: it must be in [0, 1)")
    check(
        config.mid_block_scale_factor != 0,
        "mid_block_scale_factor is 0: sums are divided by it, use 1 for the paper's network",
    )
    check_choice("downsample_padding", config.downsample_padding, (0, 1))
    check_choice(
        "resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift")
    )
    check_choice("attention", config.attention, ("sdpa", "xformers", "auto"))
    for way, types in (("down", config.down_block_types), ("up", config.up_block_types)):
        field, plain = f"{way}_block_types", f"{way.capitalize()}Block2D"
        check(
            len(types) == len(channels),
            f"{field} has {len(types)} entries and block_out_channels {len(channels)}: "
            "give one for each level",
        )
        for index, block_type in enumerate(types):
            check_choice(f"{field}[{index}]", block_type, (plain, f"Attn{plain}"))

    if channels and min(channels) >= 1:
        factor = 2 ** (len(channels) - 1)
        check(
            config.sample_size % factor == 0,
            f"sample_size is {config.sample_size}: {len(channels)} levels halve it "
            f"{len(channels) - 1} times, so it must be a multiple of {factor}; "
            f"{_nearest_multiples(config.sample_size, factor)}, or fewer levels",
        )
        check(
            channels[0] // 2 > config.freq_shift,
            f"block_out_channels[0] is {channels[0]}: its half, the number of frequencies in the "
            f"time embedding, must exceed freq_shift={config.freq_shift}; use at least "
            f"{2 * config.freq_shift + 2}",
        )
        for index, width in enumerate(channels):
            check(
                groups < 1 or width % groups == 0,
                f"block_out_channels[{index}] is {width}: it must be a multiple of "
                f"norm_num_groups={groups}; {_nearest_multiples(width, groups)}, "
                "or other groups",
            )
        for width in sorted(_attending_channels(config)):
            check(
                head is None or head < 1 or width % head == 0,
                f"attention_head_dim is {head}: it must divide the {width} channels of a level "
                "that attends; use one that does, or None for one head",
            )
    if problems:
        raise UserError("this U-Net cannot be built:" + "".join(f"\n  - {p}" for p in problems))


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value - value % max(of, 1), value - value % max(of, 1) + of
    return f"use {below} or {above}" if below > 0 else f"use {above}"


def _attending_channels(config: UNetConfig) -> set[int]:
    """Channel counts at which there is attention; the middle always attends."""
    widths, down, up = config.block_out_channels, config.down_block_types, config.up_block_types
    # Not strict: a wrong number of types is `check_shape`'s to report.
    descent = {w for w, kind in zip(widths, down, strict=False) if kind == "AttnDownBlock2D"}
    ascent = {w for w, kind in zip(widths[::-1], up, strict=False) if kind == "AttnUpBlock2D"}
    return descent | ascent | {widths[-1]}


def _memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and activations: what tensor cores want, and what CPUs want.

    A CPU convolves in either; its GroupNorm is careful, and several times faster, in this one only.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


class UNet(nn.Module):
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

    def __init__(self, config: UNetConfig) -> None:
        check_shape(config)
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        deepest = len(widths) - 1
        head_dims = {config.attention_head_dim or width for width in _attending_channels(config)}
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
        timesteps: Tensor,
        labels: Tensor | None = None,
        low_resolution: Tensor | None = None,
        augmentation: Tensor | None = None,
        features: Tensor | None = None,
        return_features: bool = False,
    ) -> Any:
        """Predict.

        Args:
            x: `[B, in_channels, H, W]`, float, any memory format; H and W multiples of
                `downscale_factor`. It is cast to the precision of the weights.
            timesteps: `[B]` or 0-dim, integer or float, on the device of `x`.
            labels: int64 `[B]` in [0, num_class_embeds), if and only if the network is
                class-conditional; `null_class` for an unconditional prediction.
            low_resolution: `[B, in_channels, H, W]`, the low-resolution image, upsampled and noised
                by `NoiseConditioningAugmentation`, if the network is conditioned on one.
            augmentation: int64 `[B]`, the level of that noise.
            features: what enters the last level on the way up, `[B, C, H, W]`, as an evaluation
                close by returned it. All deeper levels are then left out (Ma, Fang & Wang,
                "DeepCache", 2024).
            return_features: return these features as well.

        Returns:
            `[B, out_channels, H, W]` in the precision the network ran in, channels-last but on a
            CPU; with `return_features`, that and the features.

        Raises:
            ValueError: H or W cannot be halved often enough, or labels or the low-resolution image
                are missing or superfluous.
        """
        if x.shape[2] % self.downscale_factor or x.shape[3] % self.downscale_factor:
            raise ValueError(
                f"x is {x.shape[2]}×{x.shape[3]} pixels; this U-Net of {len(self.down_blocks)} "
                f"levels needs multiples of {self.downscale_factor}"
            )
        enlarging = self.low_resolution is not None
        if (low_resolution is not None, augmentation is not None) != (enlarging, enlarging):
            raise ValueError(
                f"this U-Net enlarges images of side {self.low_resolution}: give low_resolution, "
                "[B, C, H, W], and augmentation, [B]"
                if enlarging
                else "low_resolution or augmentation given, but this U-Net was made without"
            )
        embedding = self._embed(timesteps.expand(x.shape[0]), labels, augmentation)
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

    @property
    def downscale_factor(self) -> int:
        """How many pixels of the image's side become one at the lowest resolution."""
        return int(2 ** (len(self.down_blocks) - 1))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images the network was made for."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class" in classifier-free guidance: the last one.

        None for an unconditional network.
        """
        embeddings = self.config.num_class_embeds
        return None if embeddings is None else embeddings - 1

    @property
    def low_resolution(self) -> int | None:
        """Side of the small image that the network enlarges; None: it is shown none."""
        return self.config.low_resolution

    def regions(self) -> list[nn.Module]:
        """Return the submodules worth compiling one by one: residual and attention blocks.

        Blocks of equal shape share one compiled graph, so this compiles in a fraction of the time
        that the whole network takes and loses little speed.
        """
        return [m for m in self.modules() if isinstance(m, ResidualBlock | Attention)]

    def compile_regions(self, **options: Any) -> None:
        """Compile every region in place, on its first call; parameter names do not change.

        Args:
            options: for `torch.compile`. Shapes are static unless `dynamic` says otherwise.
        """
        regions = self.regions()
        # All blocks of a kind run the same code, and torch gives up on code that it has compiled
        # eight times: fewer than there are distinct blocks here. Twice, for training and sampling.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, 2 * len(regions)
        )
        for region in regions:
            region.compile(**{"dynamic": False, **options})

    def enable_activation_checkpointing(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again.

        Gradients stay the same, dropout included; memory falls and a step takes about a third
        longer.

        Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
        """
        # Saving the generator's state waits for the device: only where dropout needs it.
        recompute = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
        )
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpoint = recompute

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

    def _embed(
        self, timesteps: Tensor, labels: Tensor | None, augmentation: Tensor | None
    ) -> Tensor:
        """Embed timesteps, labels and augmentation levels, `[B]` each: `[B, E]`, SiLU taken."""
        embedding: Tensor = self.time_embedding(self._sinusoids(timesteps))
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError(
                    "this U-Net is class-conditional: give labels, int64 [B]; null_class "
                    f"({self.null_class}) stands for no class"
                )
            embedding = embedding + self.class_embedding(labels).to(embedding.dtype)
        elif labels is not None:
            raise ValueError("labels given, but this U-Net is unconditional (num_class_embeds)")
        if self.augmentation_embedding is not None and augmentation is not None:
            embedding = embedding + self.augmentation_embedding(self._sinusoids(augmentation))
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
