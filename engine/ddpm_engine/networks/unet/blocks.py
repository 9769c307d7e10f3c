"""What the U-Net is made of: residual blocks, resampling, and the levels that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.base import Recomputed
from ddpm_engine.networks.unet.attention import Attend, Attention
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.norm import GroupNorm


def embedding_channels(config: UNetConfig) -> int:
    """Width of the embedding that conditions the residual blocks."""
    return 4 * config.block_out_channels[0]


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding between them: `[B, in, H, W]` → `[B, out, H, W]`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        config: groups, epsilon, dropout, and how the embedding enters.
        divisor: the residual sum is divided by it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.divisor = divisor
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(
            embedding_channels(config), 2 * out_channels if self.scale_shift else out_channels
        )
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block; `embedding` is `[B, E]` with its SiLU already taken."""
        h = self.conv1(self.norm1(x))
        condition = self.time_emb_proj(embedding)
        if self.scale_shift:
            h = self.norm2(h, *condition.chunk(2, dim=1))
        else:
            h = self.norm2(h + condition.view(*condition.shape, 1, 1))
        h = self.conv2(self.dropout(h))
        y: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return y if self.divisor == 1 else y / self.divisor


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution: `[B, C, H, W]` → `[B, C, H/2, W/2]`."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, C, H, W]` to `[B, C, H / 2, W / 2]`.

        First right and bottom are padded, if the convolution does not pad by itself.
        """
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        y: Tensor = self.conv(x)
        return y


class Upsample(nn.Module):
    """Double the resolution by repetition and a convolution: `[B, C, H, W]` → `[B, C, 2H, 2W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Repeat each pixel 2×2 and convolve: `[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class Level(Recomputed):
    """The layers of one resolution: residual blocks, each followed by attention if it attends."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        config: UNetConfig,
        attend: Attend | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(i, o, config) for i, o in channels)
        self.attentions = nn.ModuleList(
            Attention(o, config, attend, config.norm_num_groups)
            for _, o in channels
            if attend is not None
        )

    def layers(self) -> Iterable[tuple[nn.Module, nn.Module | None]]:
        """Each residual block with the attention that follows it, if any."""
        return zip_longest(self.resnets, self.attentions)

    def layer(
        self, resnet: nn.Module, attention: nn.Module | None, embedding: Tensor, *features: Tensor
    ) -> Tensor:
        """Apply one layer to the concatenation of `features`.

        Args:
            resnet: its residual block.
            attention: the attention that follows, or None.
            embedding: of the timestep, `[B, E]`.
            features: `[B, C_i, H, W]` each.

        Returns:
            `[B, C, H, W]`.
        """
        # The concatenation happens in here so that checkpointing need not keep its result.
        x = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        x = resnet(x, embedding)
        return x if attention is None else attention(x)


class DownLevel(Level):
    """One resolution on the way down: `layers_per_block` layers, then downsampling unless last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        attend: Attend | None,
        last: bool,
    ) -> None:
        inputs = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        super().__init__([(i, out_channels) for i in inputs], config, attend)
        self.downsamplers = nn.ModuleList(
            [] if last else [Downsample(out_channels, config.downsample_padding)]
        )

    def forward(self, x: Tensor, embedding: Tensor, downsample: bool = True) -> list[Tensor]:
        """Return the output of every layer; the last is what the next level takes, if wanted.

        Args:
            x: `[B, C, H, W]`.
            embedding: of the timestep, `[B, E]`.
            downsample: whether the next level is wanted.

        Returns:
            `[B, C', H, W]` of each layer, and `[B, C', H / 2, W / 2]` for the next level.
        """
        outputs = []
        for resnet, attention in self.layers():
            x = self.run(self.layer, resnet, attention, embedding, x)
            outputs.append(x)
        for downsampler in self.downsamplers if downsample else ():
            outputs.append(downsampler(x))
        return outputs


class UpLevel(Level):
    """One resolution on the way up: a layer for each skip connection, then upsampling unless last.

    Args:
        in_channels: channels that come from below.
        skip_channels: channels of the skip connections, in the order of use.
        out_channels: channels of every layer's output.
        config: the network's.
        attend: attention kernel, or None for a level that does not attend.
        last: whether this is the full resolution.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        config: UNetConfig,
        attend: Attend | None,
        last: bool,
    ) -> None:
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        super().__init__(
            [(i + s, out_channels) for i, s in zip(inputs, skip_channels, strict=True)],
            config,
            attend,
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Take one skip connection a layer, the last of `skips` first; there are as many.

        Args:
            x: `[B, C, H, W]`.
            skips: `[B, C_i, H, W]` each.
            embedding: of the timestep, `[B, E]`.

        Returns:
            `[B, C', H, W]`, twice as high and wide if a level follows.
        """
        for (resnet, attention), skip in zip(self.layers(), reversed(skips), strict=True):
            x = self.run(self.layer, resnet, attention, embedding, x, skip)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Middle(Recomputed):
    """The lowest resolution between down and up: residual block, attention, residual block."""

    def __init__(self, channels: int, config: UNetConfig, attend: Attend) -> None:
        super().__init__()
        divisor = config.mid_block_scale_factor
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, config, divisor) for _ in range(2)
        )
        groups = config.attn_norm_num_groups
        # By default, scale-and-shift networks have no norm here: a quirk of `UNet2DModel` that
        # its checkpoints depend on.
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.attentions = nn.ModuleList([Attention(channels, config, attend, groups, divisor)])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[B, C, H, W]` → same shape."""
        return self.run(self._layers, x, embedding)

    def _layers(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, embedding))
        y: Tensor = self.resnets[1](x, embedding)
        return y
