"""A set of shards as a dataset indexed by position, and its batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.members import EncodedCaption, padded_length
from ddpm_engine.data.shards.manifest import ImageEmbeddings, LatentSpace, TextEmbeddings
from ddpm_engine.data.shards.reader import BadSample, DamagedSample, ShardReader
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.data.shuffle import Order
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import Pixels, fit
from ddpm_engine.sizes import Size, height_and_width
from ddpm_kernels.philox import Stream, random_integers, random_words

MAX_SUBSTITUTES = 64
"""Damaged samples in a row at one position before reading gives up."""


@dataclass(frozen=True)
class Sample:
    """The sample at one position."""

    image: Pixels | NDArray[np.float16]
    """uint8 `[H, W, C]`. Of a set of latents, their moments, means first: float16 `[2 C, h, w]`, or
    `[2, 2 C, h, w]` with those of the mirrored image."""
    label: int
    """Class, or -1 in a set without labels."""
    position: int
    """Position in the order of training."""
    caption: str | None = None
    """Caption that the position chooses among the sample's; None in a set without captions."""
    text: EncodedCaption | None = None
    """Embeddings of that caption, if the shards hold them."""
    text_length: int = 0
    """Number of tokens that a batch pads or cuts them to."""
    embedding: NDArray[np.float32] | None = None
    """`[D]`, the image's embedding, if the shards hold it."""
    faults: tuple[BadSample, ...] = ()
    """Bad samples that this one replaces."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples."""

    images: Tensor
    """uint8 `[B, C, H, W]`, channels-last in memory, not normalised. Of a set of latents, their
    moments before scaling, float16 `[B, 2 C, h, w]`, means first; where images are mirrored
    `[B, 2, 2 C, h, w]`, the second those of the mirrored image."""
    labels: Tensor | None
    """int64 `[B]`; None for a set without labels."""
    positions: Tensor
    """int64 `[B]`; everything random about a sample is keyed by its position."""
    text: Tensor | None = None
    """float16 `[B, L, D]`, embeddings of the captions' tokens, zeros behind the last."""
    text_mask: Tensor | None = None
    """bool `[B, L]`, False for padding."""
    pooled_text: Tensor | None = None
    """float16 `[B, P]`, embeddings of whole captions."""
    embeddings: Tensor | None = None
    """float32 `[B, D]`, embeddings of the images."""
    captions: tuple[str, ...] | None = None
    """The captions themselves, of a set that has captions."""
    faults: list[BadSample] = field(default_factory=list)
    """Bad samples that were replaced."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor given."""
        changed: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory; `DataLoader` calls it by this name."""
        return self.map(Tensor.pin_memory)


class ShardDataset(Dataset[Sample]):
    """Samples by position in the order of training (see `Order`), one `pread` for each member.

    A damaged sample is replaced by another that its position determines, so that no other position
    changes, and is named in the `faults` of its substitute.

    Args:
        shards: an open set, or the folder or URL of one.
        seed: of the order and of substitutes.
        size: cut and resize images to it; None takes them as they are.
        channels: convert images to 1 (grey) or 3 (RGB); None takes them as they are.
        window_shards: number of shards whose samples are mixed.
        captions: read captions, and the embeddings of them, where the set has them.
        embeddings: read the images' embeddings, where the set has them.
        flips: of a set of latents, read the moments of mirrored images, too.
        text_length: number of tokens that captions are padded or cut to; None: that of the longest
            caption, rounded up to a multiple of 8.

    Raises:
        UserError: not a finished set, or its images differ in size or channels and the argument
            that would make them equal is None; of a set of latents, `size` or `channels` is given,
            or it holds none of mirrored images.
    """

    def __init__(
        self,
        shards: ShardSet | str | os.PathLike[str],
        seed: int,
        size: Size | None = None,
        channels: int | None = None,
        window_shards: int = 16,
        captions: bool = True,
        embeddings: bool = True,
        text_length: int | None = None,
        flips: bool = False,
    ) -> None:
        self.shards = shards if isinstance(shards, ShardSet) else open_shards(shards)
        manifest, folder = self.shards.manifest, self.shards.storage
        if size is not None and min(height_and_width(size)) < 1:
            raise UserError(f"`size` is {size}; it must be at least 1", field="size")
        if channels not in (None, 1, 3):
            raise UserError(f"`channels` is {channels}; it must be 1 or 3", field="channels")
        height, width = (
            (manifest.height, manifest.width) if size is None else height_and_width(size)
        )
        channels_given, channels = channels, channels or manifest.channels
        if height is None or width is None:
            raise UserError(f"images in {folder} differ in size: choose one image size")
        if channels is None:
            raise UserError(
                f"images in {folder} are partly grey, partly RGB: choose channels 1 or 3"
            )
        self.shape = (channels, height, width)
        """`(C, H, W)` of the images, or of the latents."""
        self.latents: LatentSpace | None = manifest.latents
        """What the latents are; None: samples are images."""
        self.flips = flips and self.latents is not None
        """Whether samples are latents, and hold those of mirrored images."""
        if self.latents is not None:
            _check_latents(self.latents, str(folder), size, channels_given, flips)
            self.shape = self.latents.shape
        self.order = Order([shard.samples for shard in manifest.shards], seed, window_shards)
        self.captions = captions and manifest.captions
        """Whether samples have captions."""
        self.text: TextEmbeddings | None = manifest.text if captions else None
        """What the embeddings of captions are; None: samples have none."""
        self.text_length = (
            None if self.text is None else text_length or padded_length(self.text.longest)
        )
        """Number of tokens of the embeddings of every caption in a batch; None: there are none."""
        self.embeddings: ImageEmbeddings | None = manifest.embeddings if embeddings else None
        """What the embeddings of images are; None: samples have none."""
        self._size = size
        self._starts = np.cumsum([0] + [shard.samples for shard in manifest.shards])
        # One file more than a window has, for substitutes.
        self._reader = ShardReader(self.shards, window_shards + 1)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the manifest, which names the data."""
        return self.shards.manifest.fingerprint

    @property
    def classes(self) -> ClassNames | None:
        """Names of the labels 0, 1, ...; None for a set without labels."""
        return self.shards.manifest.classes

    def __len__(self) -> int:
        """Return the number of samples in one epoch; positions continue beyond it."""
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        """Read the sample at one position ≥ 0.

        Raises:
            UserError: `MAX_SUBSTITUTES` samples in a row are damaged.
        """
        return self._read(position, self.order.sample_at(position), self._words([position])[0])

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """Read the samples at many positions."""
        samples = self.order.samples_at(positions).tolist()
        words = self._words(positions)
        return [
            self._read(int(position), sample, word)
            for position, sample, word in zip(positions, samples, words, strict=True)
        ]

    def _read(self, position: int, sample: int, word: int) -> Sample:
        faults: list[BadSample] = []
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            row = sample - int(self._starts[shard])
            try:
                label = int(self.shards.indexes[shard][row]["label"])
                caption, text = self._caption(word, shard, row)
                return Sample(
                    self._image(shard, row) if self.latents is None else self._moments(shard, row),
                    label,
                    position,
                    caption,
                    text,
                    self.text_length or 0,
                    None if self.embeddings is None else self._embedding(shard, row),
                    tuple(faults),
                )
            except DamagedSample as damage:
                faults.append(self._reader.describe(shard, row, str(damage)))
            # Keyed by the position, like the order: a resumed run reads the same substitute.
            sample = int(
                random_integers(
                    self.order.seed,
                    torch.tensor([position]),
                    len(self.order),
                    attempt,
                    Stream.SUBSTITUTE,
                )
            )
        raise UserError(
            f"{MAX_SUBSTITUTES} samples in a row cannot be read for position {position}; the last: "
            f"{faults[-1]}. Verify {self.shards.storage} to list all damage"
        )

    def _image(self, shard: int, row: int) -> Pixels:
        channels, height, width = self.shape
        image = self._reader.image(shard, row, channels)
        if self._size is not None:
            image = fit(image, self._size)
        if image.shape != (height, width, channels):
            raise DamagedSample(f"shape {list(image.shape)} is not the set's")
        return image

    def _moments(self, shard: int, row: int) -> NDArray[np.float16]:
        moments = self._reader.moments(shard, row)
        return moments if self.flips else moments[0]

    def _words(self, positions: Sequence[int]) -> list[int]:
        """Draw the words in [0, 2³²) that choose captions, as `random_integers` would one each."""
        if not self.captions and self.text is None:
            return [0] * len(positions)
        places = torch.tensor(positions, dtype=torch.int64)
        words = random_words(self.order.seed, places, 1, 0, Stream.CAPTION)
        return [int(word) for word in words[:, 0]]

    def _caption(self, word: int, shard: int, row: int) -> tuple[str | None, EncodedCaption | None]:
        """Read the caption that a word chooses, and its embeddings."""
        captions = self._reader.captions(shard, row) if self.captions else ()
        if self.text is None:
            return (captions[word * len(captions) >> 32] if captions else None), None
        texts = self._reader.text(shard, row)
        if captions and len(texts) != len(captions):
            raise DamagedSample(f"{len(captions)} captions, embeddings of {len(texts)}")
        chosen = word * len(texts) >> 32
        try:
            text = texts[chosen]
        except ValueError as error:
            raise DamagedSample(str(error)) from error
        widths = text.tokens.shape[1], text.pooled.shape[0]
        if widths != (self.text.channels, self.text.pooled_channels):
            raise DamagedSample("the embeddings of its captions are not as wide as the set's")
        return captions[chosen] if captions else None, text

    def _embedding(self, shard: int, row: int) -> NDArray[np.float32]:
        embedding = self._reader.embedding(shard, row)
        assert self.embeddings is not None, "asked of sets that have them"
        if len(embedding) != self.embeddings.channels:
            raise DamagedSample(f"its embedding has {len(embedding)} channels, unlike the set's")
        return embedding


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one shape, and of one length of text, into a `Batch`."""
    labels = torch.tensor([sample.label for sample in samples])
    return Batch(
        images=_images_of(samples),
        labels=None if bool((labels < 0).any()) else labels,
        positions=torch.tensor([sample.position for sample in samples]),
        **_text_of(samples),
        embeddings=_stacked([sample.embedding for sample in samples]),
        faults=[fault for sample in samples for fault in sample.faults],
    )


def _images_of(samples: Sequence[Sample]) -> Tensor:
    """Return the field `images` of a `Batch`."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    # The stack is [B, H, W, C]: seen as [B, C, H, W] it is channels-last already.
    return images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images


def _text_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the fields of a `Batch` that hold captions and their embeddings."""
    captions = [sample.caption for sample in samples if sample.caption is not None]
    values: dict[str, Any] = {}
    if len(captions) == len(samples):
        values["captions"] = tuple(captions)
    texts = [sample.text for sample in samples if sample.text is not None]
    if not texts or len(texts) < len(samples):
        return values
    length, channels = samples[0].text_length, texts[0].tokens.shape[1]
    tokens = np.zeros((len(texts), length, channels), np.float16)
    mask = np.zeros((len(texts), length), np.bool_)
    for row, text in enumerate(texts):
        kept = text.tokens[:length]
        tokens[row, : len(kept)] = kept
        mask[row, : len(kept)] = True
    values |= {"text": torch.from_numpy(tokens), "text_mask": torch.from_numpy(mask)}
    return values | {"pooled_text": _stacked([text.pooled for text in texts])}


def _stacked(rows: Sequence[NDArray[Any] | None]) -> Tensor | None:
    """Stack arrays, such as vectors `[D]` to `[B, D]`; None if any is missing."""
    given = [row for row in rows if row is not None]
    return torch.from_numpy(np.stack(given)) if given and len(given) == len(rows) else None


def _check_latents(
    latents: LatentSpace, folder: str, size: Size | None, channels: int | None, flips: bool
) -> None:
    """Check that a set of latents is read as it is."""
    if size is not None or channels is not None:
        raise UserError(
            f"{folder} holds latents, which cannot be resized: leave `size` and `channels` out, or "
            "pack images of another size"
        )
    if flips and not latents.flipped:
        raise UserError(
            f"{folder} holds no latents of mirrored images: pack it with flips, or leave "
            "`data.horizontal_flip` out",
            field="data.horizontal_flip",
        )
