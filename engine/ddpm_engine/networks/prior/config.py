"""Configuration of the prior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_args

from ddpm_engine.bounds import Ge, Gt, Le, out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_engine.networks.attention import AttentionKernel
from ddpm_engine.sizes import Size, as_text, height_and_width


@dataclass(frozen=True)
class PriorConfig:
    """Shape of the prior, whose samples are vectors: images of one pixel."""

    sample_size: Annotated[Size, Ge(1), Le(1)] = 1
    """Side of the samples in pixels, 1: a vector is an image of one pixel."""
    in_channels: Annotated[int, Ge(1), Le(2**16)] = 128
    """Channels of the vectors."""
    out_channels: Annotated[int, Ge(1), Le(2**17)] = 128
    """Channels of the output; twice those of the vectors if variance is learned."""
    num_layers: Annotated[int, Ge(1), Le(10_000)] = 4
    """Number of blocks."""
    num_attention_heads: Annotated[int, Ge(1), Le(2**16)] = 4
    """Heads of each block's attention to the text."""
    attention_head_dim: Annotated[int, Ge(1), Le(2**16)] = 64
    """Channels of an attention head; the network's width is this times the heads."""
    mlp_ratio: Annotated[float, Gt(0), Le(1000)] = 4.0
    """Width of each block's hidden layer in units of the network's, positive."""
    num_class_embeds: Annotated[int, Ge(2), Le(2**31 - 1)] | None = None
    """Rows of the class embedding, null class included; None: unconditional."""
    text_channels: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Channels of a token's embedding, as the text encoder gives it; None: no text."""
    vector_channels: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Channels of the vector that is a condition, such as a pooled text; None: none."""
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
        """Width of each block's hidden layer."""
        return int(self.mlp_ratio * self.channels)

    def problems(self) -> Iterator[UserError]:
        """Report every reason why this prior cannot be built, each with its remedy."""
        if height_and_width(self.sample_size) != (1, 1):
            yield UserError(
                f"`sample_size` is {as_text(self.sample_size)}; a prior generates vectors, which "
                "are images of one pixel: it must be 1",
                "sample_size",
            )
        values = list(out_of_bounds(self))
        wrong = {problem.field for problem in values}
        yield from (problem for problem in values if problem.field != "sample_size")
        if self.attention not in get_args(AttentionKernel):
            listed = " or ".join(map(repr, get_args(AttentionKernel)))
            yield UserError(f"`attention` is {self.attention!r}; it must be {listed}", "attention")
        if (
            not wrong & {"num_attention_heads", "attention_head_dim", "mlp_ratio"}
            and self.hidden_channels < 1
        ):
            yield UserError(
                f"`mlp_ratio` is {self.mlp_ratio}, which of {self.channels} channels leaves none",
                "mlp_ratio",
            )


def check_shape(config: PriorConfig) -> None:
    """Check that a prior of this shape can be built.

    Raises:
        UserError: it cannot; the message lists every problem, each with its remedy.
    """
    if found := list(config.problems()):
        raise UserError("this prior cannot be built:" + "".join(f"\n  - {one}" for one in found))
