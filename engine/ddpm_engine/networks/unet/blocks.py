"""What the U-Net is made of: residual blocks, resampling, and the levels that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.base import Recomputed
from ddpm_engine.networks.linear import apply_together, project, split_bias
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.dropout import KeyedDropout
from ddpm_engine.networks.unet.features import Features, convolve, joined, residual
from ddpm_engine.networks.unet.norm import GroupNorm
from ddpm_engine.networks.unet.transformer import Text
from ddpm_kernels.dispatch import takes_op

MakeAttention = Callable[[], nn.Module]
"""Makes the attention that follows a residual block: `[B, C, H, W]` → same shape."""


def embedding_channels(config: UNetConfig) -> int:
    """Width of the embedding that conditions the residual blocks."""
    return 4 * config.block_out_channels[0]


class Condition(NamedTuple):
    """What conditions a residual block and the attention that follows, besides their input maps."""

    embedding: Tensor
    """`[B, E]`, SiLU taken: the noise level, class and so on."""
    projected: Tensor | None = None
    """`[B, C]` or `[B, 2 C]`, what the block makes of it, where all blocks' are made at once; see
    `project_embedding`."""
    dropout_key: Tensor | None = None
    """int64 `[B]`; see `KeyedDropout`."""
    text: Text | None = None
    """What that attention attends to; None: to its own map alone."""


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding between them: `[B, in, H, W]` → `[B, out, H, W]`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        config: groups, epsilon, dropout, and how the embedding enters.
        divisor: the residual sum is divided by it.
    """

    separate: bool = False
    """See `Network.separate_blocks`."""

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
        self.dropout = KeyedDropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, inputs: tuple[Features, ...], condition: Condition) -> Features:
        """Apply the block to `inputs` as if concatenated: `[B, C_i, H, W]` to `[B, out, H, W]`."""
        h, inputs = self.norm1(*inputs)
        h, bias = split_bias(self.conv1, h)
        dropout = self.dropout.of(condition.dropout_key)
        h, _ = self.norm2(Features(h), dropout=dropout, **self._between(condition, bias))
        h, bias = split_bias(self.conv2, h)
        shortcut = self._shortcut(*(x.map for x in inputs))
        return residual(h, *shortcut, bias, divisor=self.divisor, settled=self.separate)

    def _between(self, condition: Condition, bias: Tensor | None) -> dict[str, Tensor | None]:
        """What enters the second norm: the embedding, and the bias of the convolution before."""
        projected = condition.projected
        if self.scale_shift:
            if projected is None:
                projected = self.time_emb_proj(condition.embedding)
            scale, shift = projected.chunk(2, dim=1)
            before = None if bias is None else bias.expand(len(scale), -1)
            return {"before": before, "scale": scale, "shift": shift}
        if projected is None:
            projected = self.time_emb_proj(condition.embedding)
            projected = projected if bias is None else projected + bias
        return {"before": projected}

    def _shortcut(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inputs with the channels of the output, and the bias that is still to be added."""
        if self.conv_shortcut is None:
            (x,) = inputs
            return x, None
        if not takes_op(inputs[0]):
            return self.conv_shortcut(*inputs), None
        return project(self.conv_shortcut, *inputs)


def project_embedding(blocks: Sequence[ResidualBlock], embedding: Tensor) -> tuple[Tensor, ...]:
    """Project the embedding for several blocks at once.

    Args:
        blocks: of one network.
        embedding: `[B, E]`, SiLU taken.

    Returns:
        `[B, C]` of each block, to which the bias of its first convolution is added; `[B, 2 C]`, the
        scale and shift, of blocks that take those.
    """
    biases = [] if blocks[0].scale_shift else [block.conv1.bias for block in blocks]
    added = [bias for bias in biases if bias is not None]
    return apply_together([block.time_emb_proj for block in blocks], embedding, added)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution: `[B, C, H, W]` → `[B, C, H/2, W/2]`."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        # Of a map that is padded by two on all sides the convolution gives one row and one column
        # more than of one that is padded on the right and at the bottom only, and then the same.
        # To pad by itself would be a pass over the map.
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding or 2)
        self.crops = not padding

    def forward(self, x: Features) -> Features:
        """Convolve `[B, C, H, W]` to `[B, C, H / 2, W / 2]`."""
        h, bias = split_bias(self.conv, x.settled().map)
        return residual(F.pad(h, (-1, 0, -1, 0)) if self.crops else h, None, bias)


class Upsample(nn.Module):
    """Double the resolution by repetition and a convolution: `[B, C, H, W]` → `[B, C, 2H, 2W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Features) -> Features:
        """Repeat each pixel 2×2 and convolve: `[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        return convolve(self.conv, F.interpolate(x.settled().map, scale_factor=2.0, mode="nearest"))


class Level(Recomputed):
    """The layers of one resolution: residual blocks, each followed by attention if it attends."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        config: UNetConfig,
        attention: MakeAttention | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(i, o, config) for i, o in channels)
        self.attentions = nn.ModuleList(attention() for _ in channels if attention is not None)

    def layers(self) -> Iterable[tuple[nn.Module, nn.Module | None]]:
        """Each residual block with the attention that follows it, if any."""
        return zip_longest(self.resnets, self.attentions)

    def layer(
        self,
        resnet: nn.Module,
        attention: nn.Module | None,
        condition: Condition,
        *inputs: Features,
    ) -> Features:
        """Apply one layer to `inputs` as if concatenated.

        Args:
            resnet: its residual block.
            attention: the attention that follows, or None.
            condition: of both.
            inputs: `[B, C_i, H, W]` each.

        Returns:
            `[B, C, H, W]`.
        """
        # In here, so that checkpointing need not keep what a CPU concatenates.
        x: Features = resnet(joined(inputs), condition)
        return x if attention is None else attended(attention, x, condition)


def attended(attention: nn.Module, x: Features, condition: Condition) -> Features:
    """Apply the attention that follows a residual block: `[B, C, H, W]` to the same."""
    y: Features = attention(x) if condition.text is None else attention(x, condition.text)
    return y


class DownLevel(Level):
    """One resolution on the way down: `layers_per_block` layers, then downsampling unless last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        attention: MakeAttention | None,
        last: bool,
    ) -> None:
        inputs = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        super().__init__([(i, out_channels) for i in inputs], config, attention)
        self.downsamplers = nn.ModuleList(
            [] if last else [Downsample(out_channels, config.downsample_padding)]
        )

    def forward(
        self, x: Features, conditions: Iterator[Condition], downsample: bool = True
    ) -> list[Features]:
        """Return the output of every layer; the last is what the next level takes, if wanted.

        Args:
            x: `[B, C, H, W]`.
            conditions: of the residual blocks that follow, of which it takes its own.
            downsample: whether the next level is wanted.

        Returns:
            `[B, C', H, W]` of each layer, and `[B, C', H / 2, W / 2]` for the next level.
        """
        outputs = []
        for resnet, attention in self.layers():
            x = self.run(self.layer, resnet, attention, next(conditions), x)
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
        attention: makes the attention of a layer; None for a level that does not attend.
        last: whether this is the full resolution.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        config: UNetConfig,
        attention: MakeAttention | None,
        last: bool,
    ) -> None:
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        super().__init__(
            [(i + s, out_channels) for i, s in zip(inputs, skip_channels, strict=True)],
            config,
            attention,
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(
        self, x: Features, skips: list[Features], conditions: Iterator[Condition]
    ) -> Features:
        """Take one skip connection a layer, the last of `skips` first; there are as many.

        Args:
            x: `[B, C, H, W]`.
            skips: `[B, C_i, H, W]` each.
            conditions: of the residual blocks that follow, of which it takes its own.

        Returns:
            `[B, C', H, W]`, twice as high and wide if a level follows.
        """
        for (resnet, attention), skip in zip(self.layers(), reversed(skips), strict=True):
            x = self.run(self.layer, resnet, attention, next(conditions), x, skip)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Middle(Recomputed):
    """The lowest resolution between down and up: residual block, attention, residual block."""

    def __init__(self, channels: int, config: UNetConfig, attention: MakeAttention) -> None:
        super().__init__()
        divisor = config.mid_block_scale_factor
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, config, divisor) for _ in range(2)
        )
        self.attentions = nn.ModuleList([attention()])

    def forward(self, x: Features, conditions: Iterator[Condition]) -> Features:
        """`[B, C, H, W]` → same shape; takes the conditions of its two blocks."""
        return self.run(self._layers, x, next(conditions), next(conditions))

    def _layers(self, x: Features, first: Condition, second: Condition) -> Features:
        x = attended(self.attentions[0], self.resnets[0]((x,), first), first)
        y: Features = self.resnets[1]((x,), second)
        return y
