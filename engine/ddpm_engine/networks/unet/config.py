"""Configuration of the U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ddpm_engine.bounds import Ge, Gt, Le, Lt, out_of_bounds
from ddpm_engine.errors import UserError

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D"]
TimeScaleShift = Literal["default", "scale_shift"]
AttentionKernel = Literal["sdpa", "xformers", "auto"]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names and meaning as in diffusers' `UNet2DModel`."""

    sample_size: Annotated[int, Ge(1), Le(2**16)] = 32
    """Side of the images, in pixels."""
    in_channels: Annotated[int, Ge(1), Le(2**16)] = 3
    """Channels of the noisy image."""
    out_channels: Annotated[int, Ge(1), Le(2**17)] = 3
    """Channels of the output; twice those of the image if variance is learned."""
    block_out_channels: tuple[Annotated[int, Ge(1), Le(2**20)], ...] = (128, 256, 256, 256)
    """Channels of each resolution level, highest resolution first."""
    down_block_types: tuple[DownBlock, ...] = (
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D",
    )  # fmt: skip
    """Blocks of the levels on the way down."""
    up_block_types: tuple[UpBlock, ...] = (
        "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D",
    )  # fmt: skip
    """Blocks on the way up, lowest first."""
    layers_per_block: Annotated[int, Ge(1), Le(1000)] = 2
    """Residual blocks of each level on the way down (one more on the way up)."""
    attention_head_dim: Annotated[int, Ge(1)] | None = None
    """Channels of an attention head; None: one head."""
    norm_num_groups: Annotated[int, Ge(1)] = 32
    """Groups of every GroupNorm; they divide the channels of every level."""
    attn_norm_num_groups: Annotated[int, Ge(1)] | None = None
    """Groups of the middle attention; None: the same, or no norm if scale_shift."""
    norm_eps: Annotated[float, Gt(0), Lt(1e6)] = 1e-6
    """Epsilon of every GroupNorm, positive."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout probability inside the residual blocks, from 0 to below 1."""
    resnet_time_scale_shift: TimeScaleShift = "default"
    """Time embedding: added, or scale and shift of the second norm."""
    downsample_padding: int = 0
    """Padding: 0: right and bottom by one, as the paper's code; 1: all sides."""
    mid_block_scale_factor: Annotated[float, Gt(0), Lt(1e6)] = 1.0
    """Divisor of the middle block's residual sums."""
    flip_sin_to_cos: bool = False
    """Time embedding as [cos, sin] instead of the paper's [sin, cos]."""
    freq_shift: Annotated[int, Ge(0)] = 1
    """Shift of the frequency count in the time embedding's exponent."""
    num_class_embeds: Annotated[int, Ge(1), Le(2**31 - 1)] | None = None
    """Rows of the class embedding, null class included; None: unconditional."""
    low_resolution: Annotated[int, Ge(1)] | None = None
    """Side in pixels of the low-resolution image, a divisor of the sample size; None: no
    super-resolution."""
    attention: AttentionKernel = "sdpa"
    """Attention kernel: torch's, xformers', or the best available."""

    def problems(self) -> Iterator[UserError]:
        """Report every reason why this U-Net cannot be built, each with its remedy."""
        values = [*out_of_bounds(self), *self._unknown_choices()]
        yield from values
        if not {problem.field for problem in values} & _SIZES:
            yield from self._sizes_that_do_not_divide()

    def _unknown_choices(self) -> Iterator[UserError]:
        choices: list[tuple[str, str, object, tuple[object, ...]]] = [
            (name, f"`{name}`", getattr(self, name), allowed)
            for name, allowed in [
                ("downsample_padding", (0, 1)),
                ("resnet_time_scale_shift", get_args(TimeScaleShift)),
                ("attention", get_args(AttentionKernel)),
            ]
        ]
        for name, allowed in [
            ("down_block_types", get_args(DownBlock)),
            ("up_block_types", get_args(UpBlock)),
        ]:
            choices += [
                (name, f"entry {index} of `{name}`", entry, allowed)
                for index, entry in enumerate(getattr(self, name))
            ]
        for name, subject, value, allowed in choices:
            if value not in allowed:
                listed = " or ".join(map(repr, allowed))
                yield UserError(f"{subject} is {value!r}; it must be {listed}", name)

    def _sizes_that_do_not_divide(self) -> Iterator[UserError]:
        channels, groups = self.block_out_channels, self.norm_num_groups
        size, small, head = self.sample_size, self.low_resolution, self.attention_head_dim
        if not channels:
            yield UserError("`block_out_channels` is (); give at least one level")
            return
        for name in ("down_block_types", "up_block_types"):
            if (types := len(getattr(self, name))) != len(channels):
                yield UserError(
                    f"`{name}` has {types} entries and `block_out_channels` {len(channels)}; "
                    "give one for each level",
                    name,
                )
        if small is not None and (small >= size or size % small):
            yield UserError(
                f"`low_resolution` is {small}; it must divide `sample_size` {size} and be less; "
                "use None for a network without super-resolution",
                "low_resolution",
            )
        factor = 2 ** (len(channels) - 1)
        if size % factor:
            yield UserError(
                f"`sample_size` is {size}; {len(channels)} levels halve it {len(channels) - 1} "
                f"times, so it must be a multiple of {factor}; {_nearest_multiples(size, factor)}, "
                "or fewer levels",
                "sample_size",
            )
        if channels[0] // 2 <= self.freq_shift:
            yield UserError(
                f"entry 0 of `block_out_channels` is {channels[0]}; its half, the number of "
                f"frequencies in the time embedding, must exceed `freq_shift` {self.freq_shift}; "
                f"use at least {2 * self.freq_shift + 2}",
                "block_out_channels",
            )
        for index, width in enumerate(channels):
            if width % groups:
                yield UserError(
                    f"entry {index} of `block_out_channels` is {width}; it must be a multiple of "
                    f"`norm_num_groups` {groups}; {_nearest_multiples(width, groups)}, or other "
                    "groups",
                    "block_out_channels",
                )
        middle = self.attn_norm_num_groups
        if middle is not None and channels[-1] % middle:
            yield UserError(
                f"`attn_norm_num_groups` is {middle}; it must divide the deepest level's "
                f"{channels[-1]} channels; use None for the other norms' {groups}",
                "attn_norm_num_groups",
            )
        for width in sorted(attending_channels(self)):
            if head is not None and width % head:
                yield UserError(
                    f"`attention_head_dim` is {head}; it must divide the {width} channels of a "
                    "level that attends; use one that does, or None for one head",
                    "attention_head_dim",
                )


_SIZES = {
    "sample_size", "block_out_channels", "norm_num_groups", "attn_norm_num_groups",
    "attention_head_dim", "low_resolution",
}  # fmt: skip
"""Fields that must divide each other."""


def check_shape(config: UNetConfig) -> None:
    """Check that a U-Net of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    if found := list(config.problems()):
        raise UserError("this U-Net cannot be built:" + "".join(f"\n  - {one}" for one in found))


def attending_channels(config: UNetConfig) -> set[int]:
    """Channel counts at which there is attention; the middle always attends."""
    widths, down, up = config.block_out_channels, config.down_block_types, config.up_block_types
    # Not strict: a wrong number of types is reported by `problems`.
    descent = {w for w, kind in zip(widths, down, strict=False) if kind == "AttnDownBlock2D"}
    ascent = {w for w, kind in zip(widths[::-1], up, strict=False) if kind == "AttnUpBlock2D"}
    return descent | ascent | {widths[-1]}


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value - value % of, value - value % of + of
    return f"use {below} or {above}" if below > 0 else f"use {above}"
