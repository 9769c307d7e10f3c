"""Configuration of the U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ddpm_engine.bounds import Ge, Gt, Le, Lt, out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_engine.networks.attention import AttentionKernel
from ddpm_engine.sizes import Size, as_text, height_and_width

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"]
TimeScaleShift = Literal["default", "scale_shift"]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names and meaning as in diffusers' `UNet2DModel`.

    Those of a network that attends to text are as in `UNet2DConditionModel`, except that
    `attention_head_dim` is what it says, where that class has the number of heads under this name.
    """

    sample_size: Annotated[Size, Ge(1), Le(2**16)] = 32
    """Side of the images, or their height and width, in pixels."""
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
    attention_head_dim: Annotated[int | tuple[int, ...] | None, Ge(1)] = None
    """Channels of an attention head, of all levels or of each, highest resolution first; None: one
    head."""
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
    low_resolution: Annotated[Size | None, Ge(1)] = None
    """Side of the low-resolution image, or its height and width, in pixels, a divisor of the sample
    size; None: no super-resolution."""
    cross_attention_dim: Annotated[int, Ge(1), Le(2**20)] | None = None
    """Channels of the text's tokens that the `CrossAttn` blocks and the middle attend to; None: no
    text."""
    encoder_hid_dim: Annotated[int, Ge(1), Le(2**20)] | None = None
    """Channels of the text encoder's tokens if a linear layer projects them to
    `cross_attention_dim`; None: they have those."""
    transformer_layers_per_block: Annotated[int | tuple[int, ...], Ge(1), Le(1000)] = 1
    """Transformer blocks after each residual block that text follows, of all levels or of each,
    highest resolution first."""
    use_linear_projection: bool = False
    """Linear layers around the transformer blocks, as in Stable Diffusion 2, instead of 1×1
    convolutions, as in 1."""
    vector_channels: Annotated[int, Ge(1), Le(2**20)] | None = None
    """Channels of the vector, such as a pooled text or an image embedding, that is added to the
    time embedding; None: no vector."""
    attention: AttentionKernel = "sdpa"
    """Attention kernel: torch's, xformers', or the best available."""

    INCIDENTAL = ("attention", "dropout")
    """Fields that do not change what a trained network computes."""

    @property
    def text_channels(self) -> int | None:
        """Channels of the text encoder's tokens; None: not conditioned on text."""
        return self.encoder_hid_dim or self.cross_attention_dim

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
        if not channels:
            yield UserError("`block_out_channels` is (); give at least one level")
            return
        wrong = [*self._entries_of_levels()]
        yield from wrong
        yield from self._image_sizes()
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
        yield from self._text()
        for width, head in sorted(set() if wrong else attending(self)):
            if width % head:
                yield UserError(
                    f"`attention_head_dim` is {head}; it must divide the {width} channels of a "
                    "level that attends; use one that does, or None for one head",
                    "attention_head_dim",
                )

    def _entries_of_levels(self) -> Iterator[UserError]:
        """Report lists that have not one entry for each level."""
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types", "up_block_types", "attention_head_dim",
            "transformer_layers_per_block",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                yield UserError(
                    f"`{name}` has {len(value)} entries and `block_out_channels` {levels}; "
                    "give one for each level",
                    name,
                )

    def _image_sizes(self) -> Iterator[UserError]:
        size = height_and_width(self.sample_size)
        if self.low_resolution is not None:
            small = height_and_width(self.low_resolution)
            factors = {large / low for large, low in zip(size, small, strict=True)}
            if len(factors) > 1 or not all(one > 1 and one.is_integer() for one in factors):
                written = _written(self.low_resolution)
                yield UserError(
                    f"`low_resolution` is {written}; it must divide `sample_size` "
                    f"{_written(self.sample_size)} and be less; use None for a network without "
                    "super-resolution",
                    "low_resolution",
                )
        levels = len(self.block_out_channels)
        factor = 2 ** (levels - 1)
        for side in dict.fromkeys(side for side in size if side % factor):
            yield UserError(
                f"`sample_size` is {_written(self.sample_size)}; {levels} levels halve it "
                f"{levels - 1} times, so it must be a multiple of {factor}; "
                f"{_nearest_multiples(side, factor)}, or fewer levels",
                "sample_size",
            )

    def _text(self) -> Iterator[UserError]:
        """Report fields about text of a network without it, and the other way round."""
        if self.cross_attention_dim is not None:
            if self.attn_norm_num_groups is not None:
                yield UserError(
                    f"`attn_norm_num_groups` is {self.attn_norm_num_groups}, but the middle of a "
                    "network that attends to text has the other norms' groups; use None",
                    "attn_norm_num_groups",
                )
            return
        for name in ("down_block_types", "up_block_types"):
            kinds = [kind for kind in map(str, getattr(self, name)) if kind.startswith("Cross")]
            if kinds:
                yield UserError(
                    f"`{name}` has {kinds[0]}, which attends to text, and `cross_attention_dim` is "
                    "None; give the channels of the text's tokens, or use "
                    f"{kinds[0].removeprefix('Cross')}",
                    name,
                )
        if self.encoder_hid_dim is not None:
            yield UserError(
                f"`encoder_hid_dim` is {self.encoder_hid_dim}, but the network does not attend to "
                "text: give `cross_attention_dim`, or use None",
                "encoder_hid_dim",
            )


_SIZES = {
    "sample_size", "block_out_channels", "norm_num_groups", "attn_norm_num_groups",
    "attention_head_dim", "low_resolution", "transformer_layers_per_block",
}  # fmt: skip
"""Fields that must divide each other."""


def check_shape(config: UNetConfig) -> None:
    """Check that a U-Net of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    if found := list(config.problems()):
        raise UserError("this U-Net cannot be built:" + "".join(f"\n  - {one}" for one in found))


def head_channels(config: UNetConfig, level: int) -> int:
    """Channels of an attention head of a level, counted from the highest resolution."""
    head = config.attention_head_dim
    if isinstance(head, tuple):
        head = head[level]
    return head or config.block_out_channels[level]


def transformer_layers(config: UNetConfig, level: int) -> int:
    """Transformer blocks in a row of a level, counted from the highest resolution."""
    layers = config.transformer_layers_per_block
    return layers[level] if isinstance(layers, tuple) else layers


def attending(config: UNetConfig) -> set[tuple[int, int]]:
    """Channels of each level that attends, and of its heads; the middle always attends."""
    levels = range(len(config.block_out_channels))
    # Not strict: a wrong number of types is reported by `problems`.
    kinds: list[tuple[int, str]] = [*zip(levels, config.down_block_types, strict=False)]
    kinds += zip(reversed(levels), config.up_block_types, strict=False)
    found = {level for level, kind in kinds if "Attn" in str(kind)} | {levels[-1]}
    return {(config.block_out_channels[level], head_channels(config, level)) for level in found}


def _written(size: Size) -> str:
    """A size as a message quotes it."""
    return str(size) if isinstance(size, int) else as_text(size)


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value - value % of, value - value % of + of
    return f"use {below} or {above}" if below > 0 else f"use {above}"
