"""Configuration of the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ddpm_engine.bounds import Ge, Gt, Le, Lt, out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_engine.networks.attention import AttentionKernel
from ddpm_engine.sizes import Size, as_text, height_and_width

Norm = Literal["layer", "rms"]
FeedForwardKind = Literal["gelu", "swiglu"]
TextAttention = Literal["cross", "joint"]


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer; by default that of DiT-XL/2 on latents of 256×256 images."""

    sample_size: Annotated[Size, Ge(1), Le(2**16)] = 32
    """Side of the images or latents in pixels, or their height and width."""
    in_channels: Annotated[int, Ge(1), Le(2**16)] = 4
    """Channels of the noisy image or latents."""
    out_channels: Annotated[int, Ge(1), Le(2**17)] = 4
    """Channels of the output; twice those of the image if variance is learned."""
    patch_size: Annotated[int, Ge(1), Le(2**16)] = 2
    """Side of the patches that become tokens, in pixels; a divisor of the image's sides."""
    num_layers: Annotated[int, Ge(1), Le(10_000)] = 28
    """Number of blocks."""
    num_attention_heads: Annotated[int, Ge(1), Le(2**16)] = 16
    """Attention heads of each block."""
    attention_head_dim: Annotated[int, Ge(1), Le(2**16)] = 72
    """Channels of an attention head; the network's width is this times the heads."""
    num_class_embeds: Annotated[int, Ge(2), Le(2**31 - 1)] | None = None
    """Rows of the class embedding, null class included; None: unconditional."""
    text_channels: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Channels of a token's embedding, as the text encoder gives it; None: no text."""
    text: TextAttention = "cross"
    """Attention to the text, if there is one: a cross attention of its own after each
    self-attention, or joint, its tokens being further keys and values of the self-attention."""
    vector_channels: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Channels of the vector that is a condition, such as a pooled text; None: none."""
    norm: Norm = "layer"
    """Norm before attention, feed-forward part and output: LayerNorm, or RMSNorm with a gain."""
    norm_eps: Annotated[float, Gt(0), Lt(1e6)] = 1e-6
    """Epsilon of the norm before the feed-forward part, positive; the others' is 1e-6."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, head by head."""
    rotary: bool = False
    """Rotary position embedding of queries and keys in two dimensions."""
    feed_forward: FeedForwardKind = "gelu"
    """Feed-forward part: GELU, or SwiGLU."""
    mlp_ratio: Annotated[float, Gt(0), Le(1000)] = 4.0
    """Width of the feed-forward part in units of the network's, positive; SwiGLU, with three
    matrices for two, takes two thirds of it."""
    patch_bottleneck: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Width that patches are first projected to; None: straight to the network's."""
    shared_embedding: bool = True
    """One embedding of noise level and class for all blocks, as in the paper, instead of one for
    each, as in diffusers."""
    attention: AttentionKernel = "sdpa"
    """Attention kernel: torch's, xformers', or the best available."""

    INCIDENTAL = ("attention",)
    """Fields that do not change what a trained network computes."""

    @property
    def channels(self) -> int:
        """Width of the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden_channels(self) -> int:
        """Width of the feed-forward part."""
        width = self.mlp_ratio * self.channels
        return int(width if self.feed_forward == "gelu" else 2 * width / 3)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a column and of a row."""
        height, width = height_and_width(self.sample_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def crosses(self) -> bool:
        """Whether blocks have a cross attention."""
        return self.text_channels is not None and self.text == "cross"

    def problems(self) -> Iterator[UserError]:
        """Report every reason why this transformer cannot be built, each with its remedy."""
        values = [*out_of_bounds(self), *self._unknown_choices()]
        yield from values
        wrong = {problem.field for problem in values}
        size, patch, head = self.sample_size, self.patch_size, self.attention_head_dim
        if not wrong & {"sample_size", "patch_size"} and any(
            side % patch for side in height_and_width(size)
        ):
            shown = size if isinstance(size, int) else as_text(size)
            yield UserError(
                f"`patch_size` is {patch}; patches must divide the `sample_size` {shown} into "
                "whole ones",
                "patch_size",
            )
        if wrong & {"num_attention_heads", "attention_head_dim"}:
            return
        if self.rotary and head % 4:
            yield UserError(
                f"`attention_head_dim` is {head}; with `rotary`, each half of a head turns pairs "
                "of channels, so it must be a multiple of 4",
                "attention_head_dim",
            )
        if self.channels % 4:
            yield UserError(
                f"`num_attention_heads` is {self.num_attention_heads}; times `attention_head_dim` "
                f"{head} that makes {self.channels} channels, which the sines and cosines of two "
                "coordinates do not divide: it must be a multiple of 4",
                "num_attention_heads",
            )
        if "mlp_ratio" not in wrong and self.hidden_channels < 1:
            yield UserError(
                f"`mlp_ratio` is {self.mlp_ratio}, which of {self.channels} channels leaves none",
                "mlp_ratio",
            )

    def _unknown_choices(self) -> Iterator[UserError]:
        for name, allowed in [
            ("norm", get_args(Norm)),
            ("feed_forward", get_args(FeedForwardKind)),
            ("text", get_args(TextAttention)),
            ("attention", get_args(AttentionKernel)),
        ]:
            value = getattr(self, name)
            if value not in allowed:
                listed = " or ".join(map(repr, allowed))
                yield UserError(f"`{name}` is {value!r}; it must be {listed}", name)


def check_shape(config: DiTConfig) -> None:
    """Check that a transformer of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    if found := list(config.problems()):
        listed = "".join(f"\n  - {one}" for one in found)
        raise UserError(f"this transformer cannot be built:{listed}")
