"""Prompts of samples, and what encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import ConditioningSpec


class Encoded(Protocol):
    """Texts as an encoder gives them."""

    @property
    def tokens(self) -> Tensor:
        """float `[B, L, D]`."""
        ...

    @property
    def mask(self) -> Tensor:
        """bool `[B, L]`, False for padding."""
        ...

    @property
    def pooled(self) -> Tensor:
        """float `[B, P]`."""
        ...


class PromptEncoder(Protocol):
    """Encodes texts: `networks.text.encoder.TextEncoder`, or whatever stands for one."""

    def encode(self, captions: Sequence[str], /) -> Encoded:
        """Encode texts `[B]`, each to the same embeddings whatever it is encoded with."""
        ...


class Text(NamedTuple):
    """Embeddings of a batch of prompts."""

    tokens: Tensor
    """float32 `[B, L, D]`, zeros behind the last token."""
    mask: Tensor
    """bool `[B, L]`, False for padding."""
    pooled: Tensor
    """float32 `[B, P]`."""


class EncodedPrompts:
    """The prompts of a request by sample id, as a network takes them.

    Args:
        encoder: keeps what it has encoded, so that nothing is encoded batch after batch.
        spec: of the network: how wide the embeddings must be.
        prompts: of samples 0, 1, 2, ..., and again from the first.
        negative: the negative prompt, or None.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        spec: ConditioningSpec,
        prompts: Sequence[str],
        negative: str | None = None,
    ) -> None:
        self._encoder, self._spec = encoder, spec
        self._prompts, self._negative = prompts, negative

    def of(self, ids: Sequence[int], device: torch.device) -> Text:
        """Return the embeddings of the prompts of samples.

        Args:
            ids: `[B]`.
            device: where they go.

        Raises:
            UserError: an encoder whose embeddings do not fit the network.
        """
        wanted = [self._prompts[k % len(self._prompts)] for k in ids]
        row = {prompt: number for number, prompt in enumerate(dict.fromkeys(wanted))}
        # With the negative prompt, so that the tokens of both are as many.
        known = [*row] if self._negative is None else [*row, self._negative]
        encoded = self._encode(known, device)
        index = torch.tensor([row[prompt] for prompt in wanted], dtype=torch.int64, device=device)
        return Text(*(tensor[index] for tensor in encoded))

    def negative(self, device: torch.device, length: int) -> Text | None:
        """Return the embeddings of the negative prompt, `[1, L, D]`; None if there is none.

        Args:
            device: where they go.
            length: L, of the batch.

        Raises:
            UserError: as `of`.
        """
        if self._negative is None:
            return None
        tokens, mask, pooled = self._encode([self._negative], device)
        more = length - mask.shape[1]
        return Text(F.pad(tokens, (0, 0, 0, more)), F.pad(mask, (0, more)), pooled)

    def _encode(self, prompts: list[str], device: torch.device) -> Text:
        encoded = self._encoder.encode(prompts)
        for wanted, given, what in (
            (self._spec.text, encoded.tokens.shape[-1], "tokens"),
            (self._spec.vector, encoded.pooled.shape[-1], "pooled embeddings"),
        ):
            # A vector of another width comes from elsewhere, if the network takes tokens too.
            if wanted not in (None, given) and (what == "tokens" or self._spec.text is None):
                raise UserError(
                    f"`text_encoder` gives {what} of {given} channels; this network was built for "
                    f"{wanted}; choose the encoder that it was trained with",
                    "text_encoder",
                )
        return Text(
            encoded.tokens.to(device, torch.float32),
            encoded.mask.to(device),
            encoded.pooled.to(device, torch.float32),
        )


def check_prompts(prompts: Sequence[str], field: str = "prompts") -> None:
    """Refuse what is no list of texts.

    Args:
        prompts: `[N]`.
        field: that they are from.

    Raises:
        UserError: an empty list, something else than text, or text that is not UTF-8.
    """
    if not prompts:
        raise UserError(f"`{field}` is empty; give at least one, or leave it out", field)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"`{field}` has {prompt!r}; it must be text", field)
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"`{field}` has {prompt!r}, which is not UTF-8; correct it", field
            ) from None
