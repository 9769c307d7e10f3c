"""Stream shards that cannot be indexed: WebDataset's pipeline, resampled.

Every worker of every rank samples shards with replacement, independently, and mixes samples in a
buffer. The guarantees are weaker than an index's: no epochs, no exact resume (a resumed run samples
other shards), and a flipped bit that the image format accepts goes unnoticed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import IO, Any, Protocol

import torch
import webdataset
from braceexpand import braceexpand
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys

from ddpm_engine.data.dataset import Batch, Sample
from ddpm_engine.data.members import EXTENSIONS_BESIDE, MAX_CAPTIONS, parse_captions
from ddpm_engine.data.remote.fetch import Body, FetchError, check_scheme, retried
from ddpm_engine.data.shards.reader import BadSample
from ddpm_engine.data.tar import (
    MAX_LABEL,
    MAX_PAYLOAD,
    belongs_to_sample,
    label_of,
    members_of,
    open_tar,
)
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, decode, fit
from ddpm_engine.locations import is_url, redacted
from ddpm_engine.sizes import Size, height_and_width

BUFFER = 1000
"""Decoded samples in the shuffle buffer of each worker."""
CAPTIONS = EXTENSIONS_BESIDE["captions"]
LATENTS = EXTENSIONS_BESIDE["moments"]
MAX_FAULTS_IN_A_ROW = 64
PATIENCE_SECONDS = 300.0
"""Time without a sample after which a stream ends at its next fault."""
MAX_SHARDS = 1_000_000


class _Readable(Protocol):
    def read(self, size: int) -> bytes: ...


def is_stream(location: str) -> bool:
    """Whether a location names shards themselves rather than a folder with a manifest."""
    return location.startswith("pipe:") or re.split("[?#]", location)[0].endswith(".tar")


class ShardStream(IterableDataset[Sample]):
    """An endless stream of samples; every iterator samples shards independently.

    Samples have no positions of their own: see `number_batches`.

    Args:
        pattern: URLs or paths of shards, with braces, such as `https://host/shard-{000..009}.tar`;
            or `pipe:` and a command for a shell.
        size: cut and resize images to it.
        channels: convert images to 1 (grey) or 3 (RGB).
        classes: every sample must have a label below it; None: labels are ignored.
        allow_pipe: whether `pipe:` commands may be run.
        captions: every sample must have captions, of which one is taken at random; False: they are
            ignored.

    Raises:
        UserError: a malformed pattern, one of local files of which none exists, a `pipe:` without
            permission, or an unreadable scheme.
    """

    def __init__(
        self,
        pattern: str,
        size: Size,
        channels: int,
        classes: int | None = None,
        allow_pipe: bool = False,
        captions: bool = False,
    ) -> None:
        self.pattern = redacted(pattern)
        self.shape = (channels, *height_and_width(size))
        self.captions = captions
        """Whether samples have captions."""
        self.text = None
        """A stream has no embeddings of captions: no manifest says whose they are."""
        self.text_length = None
        self.embeddings = None
        """Nor has it embeddings of images."""
        self.latents = None
        """Nor has it latents."""
        self.flips = False
        self._size = size
        self._channels = channels
        self._classes = classes
        try:
            self.urls = list(itertools.islice(braceexpand(pattern), MAX_SHARDS + 1))
        except ValueError as error:
            raise UserError(
                f"`data.path` {self.pattern} has braces that do not match", field="data.path"
            ) from error
        if len(self.urls) > MAX_SHARDS:
            raise UserError(
                f"`data.path` {self.pattern} names more than {MAX_SHARDS} shards", field="data.path"
            )
        for url in self.urls:
            if url.startswith("pipe:"):
                if not allow_pipe:
                    raise UserError(
                        f"`data.path` {redacted(url)} would run a command in a shell: if you "
                        "trust it, set `data.allow_pipe`",
                        field="data.path",
                    )
            elif is_url(url):
                check_scheme(url)
        local = [url for url in self.urls if not url.startswith("pipe:") and not is_url(url)]
        if local and not any(map(os.path.exists, local)):
            raise UserError(
                f"`data.path` {pattern} names no file that exists; the first would be {local[0]}",
                field="data.path",
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the pattern without query strings, which names the data as well as possible."""
        return hashlib.sha256(f"stream\0{self.pattern.partition('?')[0]}".encode()).hexdigest()

    @property
    def classes(self) -> None:
        """A stream has labels, and no names for them."""

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples for ever.

        Raises:
            UserError: `MAX_FAULTS_IN_A_ROW` faults without a sample between them.
        """
        faults: list[BadSample] = []
        # Not seeded: with a seed, a resumed run would begin the stream again.
        shards = webdataset.ResampledShards(self.urls, deterministic=False)
        decoded = self._decoded((entry["url"] for entry in shards), faults)
        pipeline = webdataset.filters.shuffle(BUFFER, initial=BUFFER // 10)
        for sample in pipeline(decoded):
            yield replace(sample, faults=tuple(faults))
            faults.clear()

    def _decoded(self, urls: Iterable[str], faults: list[BadSample]) -> Iterator[Sample]:
        """Decode samples before they are mixed, so that the buffer's memory is bounded."""
        in_a_row, last = 0, time.monotonic()
        for url in urls:
            for found in self._samples(url):
                if isinstance(found, Sample):
                    yield found
                    in_a_row, last = 0, time.monotonic()
                    continue
                faults.append(found)
                in_a_row += 1
                patient = in_a_row == 1 or time.monotonic() - last < PATIENCE_SECONDS
                if in_a_row == MAX_FAULTS_IN_A_ROW or not patient:
                    raise UserError(
                        f"{in_a_row} samples or shards in a row of {self.pattern} cannot be read; "
                        f"the last: {found}"
                    )

    def _samples(self, url: str) -> Iterator[Sample | BadSample]:
        """Yield a shard's samples; a `BadSample` in place of an unusable one, or of the rest."""
        count = 0
        try:
            with _opened(url) as stream:
                members = _members(stream, url, self.captions)
                for group in group_by_keys(members):
                    if not any(map(belongs_to_sample, group)):
                        continue  # a text that is the caption of nothing
                    count += 1
                    yield self._sample(group)
        except (OSError, tarfile.TarError, ValueError) as error:
            yield BadSample(redacted(url), None, str(error))
        else:
            if not count:
                yield BadSample(redacted(url), None, "it holds no images")

    def _sample(self, group: dict[str, Any]) -> Sample | BadSample:
        extension = next((known for known in EXTENSIONS if known in group), None)
        try:
            if extension is None and LATENTS in group:
                raise DecodeError("it is a latent: use indexed shards")
            if extension is None:
                raise DecodeError(f"no image ({', '.join(EXTENSIONS)})")
            image = fit(decode(group[extension], extension, self._channels), self._size)
            label = -1
            if self._classes is not None:
                label = label_of(group)
                if not 0 <= label < self._classes:
                    raise ValueError(f"label {label} is not within 0 to {self._classes - 1}")
            caption = self._caption(group)
        except ValueError as error:
            return BadSample(group["__url__"], group["__key__"], str(error))
        return Sample(image, label, position=-1, caption=caption)

    def _caption(self, group: dict[str, Any]) -> str | None:
        if not self.captions:
            return None
        if CAPTIONS not in group:
            raise ValueError(f"no captions ({CAPTIONS})")
        # At random, like the sample: a stream has no position yet that could choose.
        return random.choice(parse_captions(group[CAPTIONS]))


def number_batches(batches: Iterable[Batch], positions: Iterable[list[int]]) -> Iterator[Batch]:
    """Give streamed samples the positions that their places in the batches have.

    Noise and timesteps then depend on step and place in the batch, as in any run.
    """
    for places, batch in zip(positions, batches, strict=False):
        yield replace(batch, positions=torch.tensor(places))


def _members(stream: _Readable, url: str, captions: bool) -> Iterator[dict[str, Any]]:
    """Yield members as WebDataset's `group_by_keys` takes them, bounded before they are read."""
    with open_tar(_Buffered(stream), "r|") as tar:
        for key, extension, member in members_of(tar):
            if captions and extension == CAPTIONS:
                # Whatever is behind the bound only shows that there is too much.
                content = _content(tar, member, MAX_CAPTIONS + 1)
                yield {"fname": f"{key}.txt", "data": content, "__url__": redacted(url)}
                continue
            if not belongs_to_sample(extension):
                continue
            bound = MAX_LABEL if extension in ("cls", "json") else MAX_PAYLOAD
            if member.size > bound:
                raise ValueError(f"{member.name} has {member.size} bytes, more than {bound}")
            content = _content(tar, member, bound)
            yield {"fname": f"{key}.{extension}", "data": content, "__url__": redacted(url)}
        # tarfile takes a damaged header for the end of the archive: the real end is zeros.
        while piece := tar.fileobj.read(1 << 20):
            if piece.strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header before byte {tar.offset}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, at_most: int) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only regular members are kept"
    return file.read(at_most)


class _Buffered:
    """A stream as tarfile needs it: reads return fewer bytes only at the end."""

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size and (piece := self._stream.read(size - len(content))):
            content += piece
        return bytes(content)


def _opened(url: str) -> AbstractContextManager[_Readable]:
    if url.startswith("pipe:"):
        return _pipe(url.removeprefix("pipe:"))
    if is_url(url):
        return retried(lambda: Body(url))
    return open(url, "rb")


@contextmanager
def _pipe(command: str) -> Iterator[IO[bytes]]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            while process.stdout.read(1 << 20):  # what follows the end of the archive
                pass
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise FetchError(f"pipe:{command}", f"it ended with status {process.returncode}")
