"""Attention to the tokens of a text, whose keys and values do not depend on the noise level."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.attention import Attend
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.linear import apply_together


class Text(NamedTuple):
    """A text as one attention is given it."""

    values: Tensor
    """Tokens, `[B, L, width]`; or the keys and values of that attention, `[B, L, 2 width]`."""
    mask: Tensor | None
    """bool `[B, L]`, False for padding; None: all count."""
    projected: bool
    """Whether the values are keys and values."""


class TextProjection(nn.Module):
    """Brings embeddings of tokens to a network's width: `[B, L, text]` → `[B, L, width]`.

    Source: Chen et al., "PixArt-α: Fast Training of Diffusion Transformer for Photorealistic
    Text-to-Image Synthesis", 2023.
    """

    def __init__(self, text_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, text: Tensor) -> Tensor:
        """Apply two layers, GELU between them, to `[B, L, text]`."""
        hidden = self.linear_1(text.to(self.linear_1.weight.dtype))
        projected: Tensor = self.linear_2(F.gelu(hidden, approximate="tanh"))
        return projected


class HeadNorm(nn.RMSNorm):
    """RMSNorm of queries or keys, `[B, L, heads, D]`, over the channels of a head.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, L, heads, D]`."""
        # In one precision throughout, or torch would take several passes.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class AttendsToText(nn.Module):
    """An attention that takes keys and values from a text."""

    heads: int
    norm_k: HeadNorm | None

    @abstractmethod
    def text_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the layers that make keys and values of tokens."""

    def project_text(self, tokens: Tensor) -> Tensor:
        """Compute keys and values of tokens, `[B, L, width]`: `[B, L, 2 width]`."""
        key, value = apply_together(self.text_layers(), tokens)
        if self.norm_k is not None:
            key = self.norm_k(key.unflatten(2, (self.heads, -1))).flatten(2)
        return torch.cat([key, value], dim=2)

    def keys_and_values(self, text: Text) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a text, `[B, L, heads, D]` each; see `Text`."""
        both = text.values if text.projected else self.project_text(text.values)
        key, value = both.unflatten(2, (2, self.heads, -1)).unbind(2)
        return key, value


class CrossAttention(AttendsToText):
    """Attention of all tokens to those of a text: `[B, N, C]` → same shape.

    Args:
        channels: C.
        heads: their number, a divisor of C.
        qk_norm: whether queries and keys are normalised, head by head.
        eps: of that norm.
        attend: the attention kernel.
    """

    def __init__(
        self, channels: int, heads: int, attend: Attend, qk_norm: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.norm_q = HeadNorm(channels // heads, eps) if qk_norm else None
        self.norm_k = HeadNorm(channels // heads, eps) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def text_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the layers that make keys and values of tokens."""
        return self.to_k, self.to_v

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """Let every token of `[B, N, C]` attend to the text; see `Text`."""
        query = self.to_q(x).unflatten(2, (self.heads, -1))
        if self.norm_q is not None:
            query = self.norm_q(query)
        key, value = self.keys_and_values(text)
        attended = self.attend(query, key, value, text.mask)
        y: Tensor = self.to_out[0](attended.flatten(2))
        return y


def precompute_text(
    attentions: Sequence[AttendsToText], projection: TextProjection, conditioning: Conditioning
) -> Conditioning:
    """Replace a text by the keys and values that the attentions of a network make of it.

    Args:
        attentions: in the order of their use.
        projection: what tokens pass first.
        conditioning: with `text`, or with nothing to replace.

    Returns:
        The same, `text_projections` being `[B, L, 2 width]` of each attention side by side.
    """
    if conditioning.text is None:
        return conditioning
    tokens = projection(conditioning.text)
    projections = torch.cat([each.project_text(tokens) for each in attentions], dim=2)
    return replace(conditioning, text=None, text_projections=projections)


def text_of_each(count: int, projection: TextProjection, conditioning: Conditioning) -> list[Text]:
    """Return what each of several attentions is given of a text.

    Args:
        count: of the attentions.
        projection: what tokens pass first.
        conditioning: with `text` or `text_projections`.
    """
    mask, projections = conditioning.text_mask, conditioning.text_projections
    if projections is not None:
        return [Text(part, mask, projected=True) for part in projections.chunk(count, dim=2)]
    assert conditioning.text is not None, "checked by `check_given`"
    return count * [Text(projection(conditioning.text), mask, projected=False)]
