"""The text of a run: where embeddings of captions come from, and captions encoded in training.

Shards may hold the embeddings of their captions, packed once. Where they hold captions alone, each
rank encodes those of its samples before the step that needs them, which may be captured: a step
finds embeddings of one length at one place, wherever they come from. Either way they are rounded to
half precision, so that both ways give the same embeddings to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.open import TrainingData
from ddpm_engine.errors import UserError
from ddpm_engine.locations import redacted, user_path
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.files.places import PACKAGE
from ddpm_engine.networks.text.encoder import EncodedText, TextEncoder
from ddpm_engine.networks.text.folders import is_padded, open_text_encoder

NULL_PROMPT = ""
"""Text that stands for none with an encoder that pads its texts."""
DEFAULT_LENGTH = 32
"""Tokens that captions encoded in training are padded or cut to, unless `data.text_length` is
given."""


@dataclass(frozen=True, eq=False)
class RunText:
    """What a run's captions are encoded by."""

    place: str
    """Folder or package of the encoder."""
    fingerprint: str
    """Identifies the encoder."""
    length: int
    """Tokens that every caption is padded or cut to."""
    packed: bool
    """Whether the shards hold the embeddings."""
    encoder: TextEncoder | None
    """The encoder; None: nothing is encoded in training."""
    null: EncodedText | None = None
    """What stands for no text: with an encoder that pads its texts, the empty one, as the networks
    know it that are used with such; None: zeros."""

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says of the encoder, as JSON values; its folder is absolute."""
        place = self.place
        if not place.startswith(PACKAGE):
            place = os.path.abspath(user_path(place))
        record = {"place": place, "fingerprint": self.fingerprint, "length": self.length}
        return record if self.null is None else {**record, "null_prompt": NULL_PROMPT}

    def encoded(self, batch: Batch) -> Batch:
        """Add the embeddings of a batch's captions, float16, on the encoder's device.

        Args:
            batch: as the data loader gives it; one that has embeddings stays as it is.

        Raises:
            UserError: there are no captions, or one that cannot be encoded.
        """
        if self.packed:
            return batch
        if batch.captions is None:
            raise UserError(
                "the network is conditioned on text, and samples have no captions; pack shards "
                "with captions"
            )
        return self.with_captions(batch, batch.captions)

    def with_captions(self, batch: Batch, captions: Sequence[str]) -> Batch:
        """Replace the captions of a batch, and encode them.

        Args:
            batch: of B samples.
            captions: B of them.

        Raises:
            UserError: one that cannot be encoded.
        """
        assert self.encoder is not None, "opened for whoever encodes"
        tokens, mask, pooled = self.encoder.encode(captions, self.length)
        return replace(
            batch,
            captions=tuple(captions),
            text=tokens.half(),
            text_mask=mask,
            pooled_text=pooled.half(),
        )


def open_text(
    config: RunConfig,
    dataset: TrainingData,
    spec: ConditioningSpec,
    device: torch.device | str,
) -> RunText | None:
    """Find what encodes a run's captions, and open it if anything is encoded in training.

    Args:
        config: the run.
        dataset: its data.
        spec: the conditions that its network was built for.
        device: where captions are encoded.

    Returns:
        None: the network is not conditioned on text.

    Raises:
        UserError: the encoder cannot be opened, is another than the shards' embeddings are of, or
            gives embeddings that do not fit the network.
    """
    data = config.data
    if spec.text is None and (spec.vector is None or data.vector == "image"):
        return None
    stored = dataset.text
    place = data.text_encoder or (None if stored is None else stored.encoder)
    assert place is not None, "the data was opened for a network that takes text"
    encoder = None
    pads = spec.text is not None and _pads(place, stored is not None)
    if stored is None or pads or (config.log.prompts and config.log.sample_every):
        encoder = open_text_encoder(place, device)
        _check_widths(encoder, spec, data.vector == "text")
    if stored is None:
        assert encoder is not None
        usual = encoder.max_length if pads else min(DEFAULT_LENGTH, encoder.max_length)
        length = data.text_length or usual
        null = _null(encoder, length) if pads else None
        return RunText(place, encoder.fingerprint, length, False, encoder, null)
    if encoder is not None and encoder.fingerprint != stored.fingerprint:
        raise UserError(
            f"{redacted(str(data.path))} holds embeddings of another text encoder "
            f"({stored.encoder}, {stored.fingerprint[:12]}…) than {place} "
            f"({encoder.fingerprint[:12]}…); name that one by `data.text_encoder`, or pack the "
            "shards again",
            "data.text_encoder",
        )
    assert dataset.text_length is not None, "there are embeddings"
    null = _null(encoder, dataset.text_length) if encoder is not None and pads else None
    return RunText(place, stored.fingerprint, dataset.text_length, True, encoder, null)


def _pads(place: str, dispensable: bool) -> bool:
    """Whether an encoder pads texts; one that nothing needs may be gone."""
    try:
        return is_padded(place)
    except UserError:
        if not dispensable:
            raise
        return False


def _null(encoder: TextEncoder, length: int) -> EncodedText:
    """What stands for no text, rounded as captions are."""
    tokens, mask, pooled = encoder.encode([NULL_PROMPT], length)
    return EncodedText(tokens.half().float(), mask, pooled.half().float())


def _check_widths(encoder: TextEncoder, spec: ConditioningSpec, pools: bool) -> None:
    """Refuse embeddings that do not fit the network."""
    for what, wanted, given in (
        ("tokens", spec.text, encoder.channels),
        ("whole captions", spec.vector if pools else None, encoder.pooled_channels),
    ):
        if wanted not in (None, given):
            raise UserError(
                f"`data.text_encoder` {encoder.place} gives embeddings of {what} with {given} "
                f"channels, and the network takes {wanted}; build the network for {given}, or name "
                "another encoder",
                "data.text_encoder",
            )


def check_same_text(recorded: Any, text: RunText | None, checkpoint: str) -> None:
    """Refuse to go on from a checkpoint with another text encoder than it was trained with.

    Args:
        recorded: what the checkpoint says, as `RunText.record` gives it; None: it says nothing.
        text: the run's.
        checkpoint: where it is, for the message.

    Raises:
        UserError: it is another.
    """
    if not isinstance(recorded, dict) or text is None:
        return
    now = text.record()
    for name in ("fingerprint", "length"):
        before = recorded.get(name)
        if before not in (None, now[name]):
            raise UserError(
                f"{checkpoint} was trained on text of {recorded.get('place')} ({name} {before}), "
                f"and this start has that of {text.place} ({name} {now[name]}); give it the same "
                "by `data.text_encoder` and `data.text_length`, or choose another `out`",
                "data.text_encoder" if name == "fingerprint" else "data.text_length",
            )
