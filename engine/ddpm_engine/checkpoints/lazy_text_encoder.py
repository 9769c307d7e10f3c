"""The text encoder that a model was trained with, opened when it is first used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddpm_engine.errors import UserError
from ddpm_engine.json_files import described
from ddpm_engine.networks.text.encoder import EncodedText, TextEncoder
from ddpm_engine.networks.text.folders import open_text_encoder

_SHOWN = 12
"""Digits of a fingerprint in a message."""


class LazyTextEncoder:
    """The text encoder of a trained model: it is opened, and compared, when it is first used.

    Args:
        place: as `open_text_encoder` takes it.
        fingerprint: of the encoder that the model was trained with; None: it is not known.
        length: number of tokens that the model was trained with; None: that of the longest text.
        channels: of a token's embedding, as the network takes it; None: it takes none.
        device: where it computes.
        recorded: whether `place` is what the training recorded, rather than what someone gave.
    """

    def __init__(
        self,
        place: str,
        *,
        fingerprint: str | None = None,
        length: int | None = None,
        channels: int | None = None,
        device: torch.device | str = "cpu",
        recorded: bool = False,
    ) -> None:
        self.place = place
        self.fingerprint = fingerprint
        self.length = length
        self._channels, self._device, self._recorded = channels, device, recorded
        self._opened: TextEncoder | None = None

    def open(self) -> TextEncoder:
        """Open the encoder, or return the one that is open.

        Raises:
            UserError: it cannot be opened, or is another than the one of the training.
        """
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def encode(self, captions: Sequence[str]) -> EncodedText:
        """Encode captions to as many tokens as in training.

        Args:
            captions: B of them.

        Raises:
            UserError: as `open`, or a caption that is not Unicode.
        """
        return self.open().encode(captions, self.length)

    def _open(self) -> TextEncoder:
        try:
            encoder = open_text_encoder(self.place, self._device)
        except UserError as error:
            if not self._recorded:
                raise UserError(str(error), "text_encoder") from error
            raise UserError(
                f"the model's text encoder cannot be opened: {error}. If it has moved, give its "
                "place as `text_encoder`",
                "text_encoder",
            ) from error
        if self.fingerprint not in (None, encoder.fingerprint):
            assert self.fingerprint is not None
            raise UserError(
                f"the text encoder {self.place} has the fingerprint "
                f"{encoder.fingerprint[:_SHOWN]}…, and the model was trained with another, of "
                f"fingerprint {self.fingerprint[:_SHOWN]}…; give that one's place as "
                "`text_encoder`",
                "text_encoder",
            )
        if self._channels not in (None, encoder.channels):
            raise UserError(
                f"the text encoder {self.place} gives {encoder.channels} channels a token, and "
                f"the network takes {self._channels}; give the one that it was trained with as "
                "`text_encoder`",
                "text_encoder",
            )
        return encoder


def recorded_text_encoder(
    record: Any,
    channels: int | None,
    device: torch.device | str,
    place: str | None = None,
) -> LazyTextEncoder | None:
    """The encoder that a checkpoint's state records; None: none is recorded, and none is given.

    Args:
        record: `place`, `fingerprint` and `length`; or None.
        channels: of a token's embedding, as the network takes it; None: it takes none.
        device: where it computes.
        place: where it is now; None: where it was in training.

    Raises:
        UserError: the record is damaged.
    """
    if record is None:
        if place is None:
            return None
        return LazyTextEncoder(place, channels=channels, device=device)
    if not _is_record(record):
        raise UserError(
            f"the checkpoint records {described(record)} as its text encoder, without the place, "
            "the fingerprint and the length that belong there; load an older checkpoint"
        )
    return LazyTextEncoder(
        record["place"] if place is None else place,
        fingerprint=record["fingerprint"],
        length=record.get("length"),
        channels=channels,
        device=device,
        recorded=place is None,
    )


def _is_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    length = record.get("length")
    texts = all(isinstance(record.get(name), str) for name in ("place", "fingerprint"))
    return texts and (length is None or (type(length) is int and length > 0))
