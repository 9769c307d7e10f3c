"""Write the shards of a set: everything that determines their bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import webdataset
from numpy.typing import NDArray
from webdataset import TarWriter

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.data.members import (
    EXTENSIONS_BESIDE,
    check_caption,
    encode_captions,
    encode_embedding,
    encode_moments,
    encode_text,
)
from ddpm_engine.data.packing.embeddings import (
    CaptionEmbeddings,
    ImageEmbedder,
    embed_images,
    one_thread,
)
from ddpm_engine.data.packing.index import Scan, index_shard
from ddpm_engine.data.packing.journal import explain_os_error
from ddpm_engine.data.packing.latents import LatentMoments
from ddpm_engine.data.packing.sources.source import Example, Source
from ddpm_engine.data.shards.manifest import ImageEmbeddings, LatentSpace, TextEmbeddings
from ddpm_engine.data.tar import MAX_CLASSES
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode, fit, with_channels
from ddpm_engine.sizes import Size

_EMBEDDED = 64  # images at a time
_EMBEDDED_BYTES = 1 << 28  # of them, unless one alone has more


class ShardWriter:
    """Everything that determines the bytes of a set, and what writes one shard.

    Args:
        source: what to pack.
        folder: of the set.
        size: as `write_shards` takes it.
        channels: likewise.
        per_shard: likewise.
        image_format: likewise.
        texts: embeddings of captions to pack too; None: there are none.
        embedder: of images; None: their embeddings are not packed.
        latents: to pack in place of images; None: images are packed.

    Raises:
        UserError: the first image cannot be read, has no captions for an encoder, or a size or
            channels that the autoencoder does not take.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        size: Size | None,
        channels: int | None,
        per_shard: int,
        image_format: str,
        texts: CaptionEmbeddings | None,
        embedder: ImageEmbedder | None,
        latents: LatentMoments | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self._size = size
        self._channels = channels
        self._per_shard = per_shard
        self._format = image_format
        self._texts = texts
        self._embedder = embedder
        self._latents = latents
        self.first = self._converted(0)
        self._check_alike(self.first)
        if latents is not None:
            height, width, depth = self.first.image.shape
            latents.autoencoder.latent_shape(height, width)
            if depth != latents.autoencoder.image_channels:
                raise UserError(
                    f"`channels` is {depth}, but the autoencoder {latents.autoencoder.place} takes "
                    f"images of {latents.autoencoder.image_channels}; leave it out",
                    field="channels",
                )
        if texts is not None and not self.first.captions:
            raise UserError(
                f"the source {source.name} has no captions for the text encoder to encode: give "
                "one with captions, or no encoder",
                field="text_encoder",
            )

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-len(self.source.examples) // self._per_shard)

    def recipe(self) -> str | None:
        """Return a hash of all of it; None where the source does not know its revision."""
        if self.source.revision is None:
            return None
        everything: tuple[Any, ...] = (
            self.source.name, self.source.revision, len(self.source.examples), self._size,
            self._channels, self._per_shard, self._format,
            np.__version__, PIL.__version__, webdataset.__version__,
        )  # fmt: skip
        if self.first.captions or self._embedder is not None:
            everything += (
                bool(self.first.captions),
                None if self._texts is None else self._texts.encoder.fingerprint,
                None if self._embedder is None else self._embedder.fingerprint,
                torch.__version__,
            )
        if self._latents is not None:
            encoder = self._latents.autoencoder
            everything += (
                encoder.fingerprint, encoder.device.type, self._latents.flips, torch.__version__,
            )  # fmt: skip
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def describe_text(self, longest: int) -> TextEmbeddings | None:
        """Describe the embeddings of captions; None: there are none.

        Args:
            longest: number of tokens of the longest caption.
        """
        if self._texts is None:
            return None
        encoder = self._texts.encoder
        return TextEmbeddings(
            encoder.place, encoder.fingerprint, encoder.channels, encoder.pooled_channels, longest
        )

    def describe_embeddings(self) -> ImageEmbeddings | None:
        """Describe the embeddings of images; None: there are none."""
        embedder = self._embedder
        if embedder is None:
            return None
        return ImageEmbeddings(embedder.name, embedder.fingerprint, embedder.channels)

    def describe_latents(self) -> LatentSpace | None:
        """Describe the latents; None: there are none."""
        height, width, _ = self.first.image.shape
        return None if self._latents is None else self._latents.describe(height, width)

    def make(self, number: int) -> Scan:
        """Write one shard and its index.

        Raises:
            UserError: images, captions or embeddings that cannot be packed, or a full disk.
        """
        path = self.folder / f"shard-{number:06d}.tar"
        end = min((number + 1) * self._per_shard, len(self.source.examples))
        with explain_os_error(path):
            self._write_tar(path, range(number * self._per_shard, end))
            return index_shard(path)

    def _write_tar(self, path: Path, numbers: range) -> None:
        computed = self._embedder is not None or self._latents is not None
        # Batches are the same in any number of processes, so that the bits are.
        count = self._embedded_at_a_time() if computed else 1
        # No encoder: TarWriter's own would pickle some extensions. mtime 0: the same bytes always.
        with (
            atomic_write(path) as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
            one_thread() if self._texts or computed else nullcontext(),
        ):
            for first in range(0, len(numbers), count):
                batch = numbers[first : first + count]
                examples = [self._converted(number) for number in batch]
                for example in examples:
                    self._check_alike(example)
                embeddings: Iterable[NDArray[np.float32] | None] = itertools.repeat(None)
                moments: Iterable[NDArray[np.float16] | None] = itertools.repeat(None)
                if computed:
                    images = np.stack([example.image for example in examples])
                if self._embedder is not None:
                    embeddings = embed_images(self._embedder, images)
                if self._latents is not None:
                    moments = self._latents.of(images)
                # Both may go on for ever: there are as many samples as examples.
                for sample in zip(batch, examples, embeddings, moments, strict=False):
                    tar.write(self._members(*sample))

    def _embedded_at_a_time(self) -> int:
        return max(1, min(_EMBEDDED, _EMBEDDED_BYTES // self.first.image.nbytes))

    def _members(
        self,
        number: int,
        example: Example,
        embedding: NDArray[np.float32] | None,
        moments: NDArray[np.float16] | None,
    ) -> dict[str, str | bytes]:
        """Return the key of a sample, and its members by extension."""
        members: dict[str, str | bytes] = {"__key__": _member_key(number, example.key)}
        if moments is None:
            members[self._format] = encode(example.image, self._format)
        else:
            members[EXTENSIONS_BESIDE["moments"]] = encode_moments(moments)
        if example.label is not None:
            members["cls"] = str(example.label).encode("ascii")
        if example.captions:
            try:
                members[EXTENSIONS_BESIDE["captions"]] = encode_captions(example.captions)
            except ValueError as error:
                raise UserError(
                    f"captions of {example.key!r} in {self.source.name} cannot be used: {error}; "
                    "correct them, or leave the image out"
                ) from error
        if self._texts is not None:
            texts = [self._texts.of(check_caption(caption)) for caption in example.captions]
            fingerprint = self._texts.encoder.fingerprint
            members[EXTENSIONS_BESIDE["text"]] = encode_text(texts, fingerprint)
        if embedding is not None:
            members[EXTENSIONS_BESIDE["embedding"]] = encode_embedding(embedding)
        return members

    def _converted(self, number: int) -> Example:
        example = self.source.examples[number]
        image = example.image
        if self._channels is not None:
            image = with_channels(image, self._channels)
        return example._replace(image=image if self._size is None else fit(image, self._size))

    def _check_alike(self, example: Example) -> None:
        """Check that an example has the first one's shape, and a label if that has one."""
        first, source = self.first, self.source
        (height, width, depth), (h, w, d) = first.image.shape, example.image.shape
        if (h, w) != (height, width):
            raise UserError(
                f"images of {source.name} differ in size: {first.key!r} is {height}×{width}, "
                f"{example.key!r} is {h}×{w}; give `size` to cut and resize all of them"
            )
        if d != depth:
            raise UserError(
                f"images of {source.name} differ in channels: {first.key!r} has {depth}, "
                f"{example.key!r} has {d}; give `channels` 1 (grey) or 3 (RGB)"
            )
        if (example.label is None) != (first.label is None):
            raise UserError(
                f"of {source.name}, only one of {first.key!r} and {example.key!r} has a label: "
                "label all images or none"
            )
        if bool(example.captions) != bool(first.captions):
            raise UserError(
                f"of {source.name}, only one of {first.key!r} and {example.key!r} has captions: "
                "caption all images or none"
            )
        limit = MAX_CLASSES if source.classes is None else len(source.classes)
        if example.label is not None and not 0 <= example.label < limit:
            raise UserError(
                f"label {example.label} of {example.key!r} in {source.name} is not within 0 to "
                f"{limit - 1}"
            )


def _member_key(number: int, name: str) -> str:
    """Return a key that is unique, sorts in order, and has no dot, where WebDataset would split."""
    key = f"{number:08d}"
    return key if name == key else f"{key}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:]}"
