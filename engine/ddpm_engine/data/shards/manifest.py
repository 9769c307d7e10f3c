"""The manifest of a set of shards: its format, and parsing it without trusting it.

A finished set is a folder of

    <shard>.tar         a standard WebDataset shard
    <shard>.index.npy   one row per sample (`index_dtype`): places of its members, checksums, label
    manifest.json       written last: a folder without one is not a finished set

The fingerprint is a hash of the shards' hashes in order. It names the data in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import MAX_SIDE

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".index.npy"
FORMAT_VERSION = 2
_IMAGES_VERSION = 1  # of sets of images and labels alone, which earlier versions read too
_LATENTS_VERSION = 3
_VERSIONS = (_IMAGES_VERSION, FORMAT_VERSION, _LATENTS_VERSION)

_BESIDE = ("captions", "text", "embeddings", "latents")
_MAX_WIDTH = 1 << 20

Described = TypeVar("Described", "TextEmbeddings", "ImageEmbeddings", "LatentSpace")

_FILE_NAME = re.compile(r"[^/\\\0]+\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One shard as it was when it was indexed."""

    name: str
    """File name inside the set's folder."""
    samples: int
    """Number of images in it."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file."""
    index_sha256: str
    """Hash of its index."""

    @property
    def index_name(self) -> str:
        """File name of the shard's index."""
        return str(Path(self.name).with_suffix(INDEX_SUFFIX))


@dataclass(frozen=True)
class TextEmbeddings:
    """Description of the embeddings of a set's captions."""

    encoder: str
    """Place of the text encoder when the set was packed."""
    fingerprint: str
    """Hash of the encoder."""
    channels: int
    """Width of a token's embedding."""
    pooled_channels: int
    """Width of a caption's embedding."""
    longest: int
    """Number of tokens of the longest caption."""


@dataclass(frozen=True)
class ImageEmbeddings:
    """Description of the embeddings of a set's images."""

    name: str
    """What computed them."""
    fingerprint: str
    """Hash of what computed them."""
    channels: int
    """Width of an image's embedding."""


@dataclass(frozen=True)
class LatentSpace:
    """Description of a set whose samples are latents: of the autoencoder that encoded them."""

    place: str
    """Place of the autoencoder when the set was packed."""
    fingerprint: str
    """Hash of the autoencoder."""
    channels: int
    """C, of the latents."""
    factor: int
    """Pixels along a side for each latent."""
    scale: float
    """What latents are multiplied by, behind the shift."""
    shift: float
    """What is subtracted from latents."""
    height: int
    """Rows of the images that were encoded."""
    width: int
    """Columns of the images that were encoded."""
    image_channels: int
    """1 (grey) or 3 (RGB), of the images that were encoded."""
    flipped: bool
    """Whether each sample holds the moments of the mirrored image, too."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of a latent."""
        return self.channels, self.height // self.factor, self.width // self.factor

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """`(1 or 2, 2 C, h, w)` of the moments of a sample."""
        channels, height, width = self.shape
        return 1 + self.flipped, 2 * channels, height, width


@dataclass(frozen=True)
class Manifest:
    """Description of a set of shards."""

    shards: tuple[Shard, ...]
    """In the order in which samples are counted."""
    height: int | None
    """Rows of every image; None where images differ."""
    width: int | None
    """Columns of every image; None where images differ."""
    channels: int | None
    """1 (grey) or 3 (RGB); None where images differ."""
    classes: tuple[str, ...] | None
    """Names of the labels 0, 1, ...; None for a set without labels."""
    captions: bool = False
    """Whether every sample has captions."""
    text: TextEmbeddings | None = None
    """Embeddings that every sample holds of its captions; None: there are none."""
    embeddings: ImageEmbeddings | None = None
    """Embedding that every sample holds of its image; None: there is none."""
    latents: LatentSpace | None = None
    """Latents that every sample holds in place of its image, whose size and channels are above;
    None: samples hold images."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all shard hashes in order: 64 hexadecimal digits."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def _version(self) -> int:
        if self.latents is not None:
            return _LATENTS_VERSION
        beside = self.captions or self.text or self.embeddings
        return FORMAT_VERSION if beside else _IMAGES_VERSION

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the set's folder, atomically.

        Raises:
            OSError: it cannot be written.
        """
        values = dataclasses.asdict(self)
        beside = [name for name in _BESIDE if values[name]]
        for name in set(_BESIDE).difference(beside):
            del values[name]
        summary = {
            "format": self._version,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
        }
        with atomic_write(directory / MANIFEST_NAME) as file:
            text = json.dumps(summary | values, indent=1, ensure_ascii=False)
            # Undecoded bytes in names become JSON's own escapes, which are read back as they were.
            file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Parse the bytes of a manifest, which may come from an untrusted source.

    Raises:
        UserError: naming `path`: they are not a manifest of this engine.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON: {error}") from error
    if not isinstance(values, dict) or "format" not in values:
        raise _damaged(path, "it is JSON of something else")
    version = values["format"]
    if version not in _VERSIONS:
        raise UserError(
            f"{path} has format {version!r}; this engine reads {_VERSIONS[0]} to {_VERSIONS[-1]}"
        )
    try:
        manifest = _parse(values)
        totals = values["fingerprint"], values["samples"]
    except KeyError as error:
        raise _damaged(path, f"it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if totals != (manifest.fingerprint, manifest.samples):
        raise _damaged(path, "its totals do not match its list of shards")
    return manifest


def how_to_index_again(folder: str) -> str:
    """Say how to make an index anew without losing what only the manifest holds."""
    return (
        f"move {MANIFEST_NAME} out of {folder} and index the shards again; keep the file, since "
        "only it has the names of the classes and of the encoders"
    )


def _damaged(path: str, reason: str) -> UserError:
    folder = path.rpartition("/")[0] or "its folder"
    return UserError(f"{path} is damaged ({reason}); restore it, or {how_to_index_again(folder)}")


def parse_shard(values: Any) -> Shard:
    """Invert `dataclasses.asdict` of a shard, without trusting the values.

    Raises:
        KeyError, TypeError, ValueError: they are not a shard's.
    """
    shard = Shard(**values)
    # A manifest came with the data: it must not point outside the folder.
    if not isinstance(shard.name, str) or not _FILE_NAME.fullmatch(shard.name):
        raise ValueError(f"shard name {shard.name!r} is not the name of a .tar file")
    os.fsencode(shard.name)  # a ValueError, if there can be no such name
    for count in (shard.samples, shard.bytes):
        if type(count) is not int or not 0 <= count < 1 << 48:
            raise ValueError(f"shard {shard.name} has no counts")
    for digest in (shard.sha256, shard.index_sha256):
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"shard {shard.name} has no hashes")
    return shard


def _parse(values: dict[str, Any]) -> Manifest:
    if not isinstance(values["shards"], list):
        raise ValueError("shards are not a list")
    shards = tuple(map(parse_shard, values["shards"]))
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    classes = values["classes"]
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError("classes are not a list of names")
    for name in ("height", "width", "channels"):
        side = values[name]
        if side is not None and (type(side) is not int or not 1 <= side <= MAX_SIDE):
            raise ValueError(f"{name} is {side!r}")
    return Manifest(
        shards=shards,
        height=values["height"],
        width=values["width"],
        channels=values["channels"],
        classes=None if classes is None else tuple(classes),
        captions=_parse_captions(values.get("captions", False)),
        text=_parse_described(TextEmbeddings, values.get("text")),
        embeddings=_parse_described(ImageEmbeddings, values.get("embeddings")),
        latents=_parse_latents(values),
    )


def _parse_captions(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"captions is {value!r}")
    return value


def _parse_described(kind: type[Described], values: Any) -> Described | None:
    """Invert `dataclasses.asdict` of what describes embeddings, without trusting the values."""
    if values is None:
        return None
    described = kind(**values)
    for field in dataclasses.fields(kind):
        value = getattr(described, field.name)
        if not _fits(value, str(field.type)):
            raise ValueError(f"{field.name} of embeddings or latents is {value!r}")
    return described


def _fits(value: Any, kind: str) -> bool:
    if kind == "int":
        return type(value) is int and 1 <= value <= _MAX_WIDTH
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is {"str": str, "bool": bool}[kind]


def _parse_latents(values: dict[str, Any]) -> LatentSpace | None:
    """Parse the description of latents, which must be of the images that the set describes."""
    latents = _parse_described(LatentSpace, values.get("latents"))
    if latents is None:
        return None
    images = tuple(values[name] for name in ("height", "width", "channels"))
    if (latents.height, latents.width, latents.image_channels) != images:
        raise ValueError(f"latents are not of images of {list(images)}")
    if latents.height % latents.factor or latents.width % latents.factor or not latents.scale:
        raise ValueError("latents have no size, or no scale")
    return latents
