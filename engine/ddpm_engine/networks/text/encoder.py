"""A frozen text encoder: from captions to embeddings of their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.printable import printable

MULTIPLE = 8
"""Lengths that nobody has chosen are multiples of this many tokens."""
KEPT_BYTES = 64 << 20
"""Embeddings of captions met before that an encoder keeps, so that none is computed twice."""
_LETTERS_PER_TOKEN = 64
"""What is behind this many letters for every token an encoder takes is not even split into tokens:
words are shorter, so that it would be cut."""


class EncodedText(NamedTuple):
    """Embeddings of captions."""

    tokens: Tensor
    """float32 `[B, L, D]`, one embedding a token; zeros behind the last."""
    mask: Tensor
    """bool `[B, L]`, True for tokens; the first is always one."""
    pooled: Tensor
    """float32 `[B, P]`, one embedding a caption."""


class TextEncoder:
    """A text encoder of transformers, frozen.

    Every caption goes through the network alone and without padding, so that its embeddings are the
    same to the bit whatever it is encoded with. They depend on the device, and on the number of
    threads as every matrix product does.

    Args:
        model: in eval mode, in float32: `model(input_ids, attention_mask)` has a
            `last_hidden_state` `[1, n, D]`.
        tokenizer: of that model.
        max_length: number of tokens of the longest text that the model takes.
        place: where it was opened from.
        fingerprint: identifies model and tokenizer, 64 hexadecimal digits.
        pooling: field of the model's output `[1, P]` that is the embedding of a caption; None: the
            mean over its tokens.
        padded: whether a text is what the tokenizer pads to `max_length` tokens, all of which the
            model and its user attend to, as in Stable Diffusion.

    Raises:
        UserError: the model fails on a plain word, or its embeddings hold NaN or infinity.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        place: str,
        fingerprint: str,
        pooling: str | None = None,
        padded: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._pooling = model, tokenizer, pooling
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._kept_bytes = 0
        self.padded = padded
        """Whether each text has `max_length` tokens, whatever its length, all of them valid."""
        self.max_length = max_length
        """Number of tokens, with those that begin and end a text, behind which it is cut."""
        self.place = place
        """The folder or `package:NAME` that it was opened from."""
        self.fingerprint = fingerprint
        """Identifies weights and tokenizer."""
        try:
            tokens, pooled = self._compute("a")
        # A damaged model fails in more ways than its library has error classes.
        except Exception as error:
            raise UserError(
                f"the text encoder {place} does not encode {'a'!r}: {error}; save it again"
            ) from error
        if not (tokens.isfinite().all() and pooled.isfinite().all()):
            raise UserError(
                f"the embeddings of the text encoder {place} hold NaN or infinity; save it again, "
                "from weights that are finite"
            )
        self.channels = tokens.shape[1]
        """D, of a token's embedding."""
        self.pooled_channels = pooled.shape[0]
        """P, of a caption's embedding."""

    @property
    def device(self) -> torch.device:
        """Where it computes, and its embeddings are."""
        device: torch.device = self._model.device
        return device

    def encode(self, captions: Sequence[str], length: int | None = None) -> EncodedText:
        """Encode captions, each distinct one once.

        Of a text longer than `max_length` tokens the beginning is encoded. A text of no tokens is
        one embedding of zeros, as the null text.

        Args:
            captions: B of them.
            length: L; embeddings are cut or padded to it, so that what a short one keeps of a text
                is the same as a long one's beginning. None: the longest's, rounded up to a multiple
                of 8 unless texts are `padded`.

        Returns:
            All tensors on the encoder's device.

        Raises:
            UserError: a caption that is not Unicode.
        """
        distinct = {caption: self._embed(caption) for caption in dict.fromkeys(captions)}
        if length is None:
            longest = max((len(tokens) for tokens, _ in distinct.values()), default=1)
            length = longest if self.padded else -(-longest // MULTIPLE) * MULTIPLE
        shape = (len(captions), length)
        tokens = torch.zeros(*shape, self.channels, device=self.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        pooled = torch.zeros(len(captions), self.pooled_channels, device=self.device)
        for row, caption in enumerate(captions):
            embedded, pooled[row] = distinct[caption]
            count = min(len(embedded), length)
            tokens[row, :count] = embedded[:count]
            mask[row, :count] = True
        return EncodedText(tokens, mask, pooled)

    def _embed(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a caption, `[n, D]` and `[P]`, which are kept for the next time."""
        kept = self._kept.pop(caption, None)
        if kept is None:
            kept = self._compute(caption)
            self._kept_bytes += _size(caption, kept)
        self._kept[caption] = kept
        while self._kept_bytes > KEPT_BYTES:
            oldest, embeddings = self._kept.popitem(last=False)
            self._kept_bytes -= _size(oldest, embeddings)
        return kept

    def _compute(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a caption, `[n, D]` and `[P]`."""
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"the text {printable(caption[:80])!r} is not Unicode, and the text encoder takes "
                "no other; write it in UTF-8"
            ) from None
        text = caption[: _LETTERS_PER_TOKEN * self.max_length]
        found = self._tokenizer(
            text,
            truncation=True,
            max_length=self.max_length,
            padding="max_length" if self.padded else False,
        )
        numbers = found["input_ids"][: self.max_length]
        if not numbers:
            zeros = torch.zeros(1, self.channels, device=self.device)
            return zeros, torch.zeros(self.pooled_channels, device=self.device)
        ids = torch.tensor([numbers], device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            # Padding is attended to like any token.
            output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        tokens = output.last_hidden_state[0].float()
        pooled = tokens.mean(dim=0) if self._pooling is None else output[self._pooling][0].float()
        return tokens, pooled


def _size(caption: str, embeddings: tuple[Tensor, Tensor]) -> int:
    return 4 * len(caption) + sum(tensor.nbytes for tensor in embeddings)
