"""Making sets of shards: packing a source, and indexing shards made elsewhere.

A set is finished when its manifest is written, which happens last. Until then the marker `.packing`
stands in the folder: it tells the leftovers of an interrupted run, which the next run may replace,
from shards that somebody else put there, which it must not touch. It is locked while a run writes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from ddpm_engine.data.images import EXTENSIONS, DecodeError, encode, fit, probe, with_channels
from ddpm_engine.data.manifest import MANIFEST_NAME, Index, Manifest, Shard, index_dtype
from ddpm_engine.data.sources import Example, Source, open_source
from ddpm_engine.errors import UserError
from ddpm_engine.files import atomic_write, fsync_directory, sha256_of

MARKER_NAME = ".packing"
MAX_CLASSES = 1 << 16
MAX_LABEL = 1 << 20
"""Bytes of a `cls` or `json` member."""
MAX_PAYLOAD = 1 << 28
"""Bytes of one encoded image; the largest npy within the bound on sides is smaller."""

_OURS = re.compile(r"(shard-\d{6,}(\.tar|\.index\.npy)|manifest\.json)(\.tmp)?|\.packing", re.ASCII)
_LABEL_NAMES = ("label", "cls", "class")


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    size: int | None = None,
    channels: int | None = None,
    per_shard: int = 10_000,
    image_format: str = "png",
) -> Manifest:
    """Pack a source into shards, indexes and a manifest.

    The same source and arguments give the same bytes. A sample's key is its number, followed by
    what the source calls it where that says more. Every file appears complete or not at all; a run
    that was interrupted is simply run again.

    Args:
        source: what to pack; consumed.
        out: folder to make; it may exist if it is empty or holds an unfinished run.
        size: cut and resize to so many pixels a side (see `fit`); None requires equal sizes.
        channels: convert to 1 (grey) or 3 (RGB); None requires that all images agree.
        per_shard: images of each shard but the last.
        image_format: png, webp and npy are lossless; jpg is smaller.

    Raises:
        UserError: an argument out of range, an empty source, images that differ, labels that are
            missing for some images, a folder in use, a full disk.
    """
    if size is not None and size < 1:
        raise UserError(f"image size must be at least 1, not {size}")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 or 3 channels, not {channels}")
    if per_shard < 1:
        raise UserError(f"a shard holds at least 1 image, not {per_shard}")
    if image_format not in EXTENSIONS:
        raise UserError(f"no image format {image_format!r}: choose {', '.join(EXTENSIONS)}")
    folder = Path(out)
    examples = _uniform(source, size, channels)
    first = next(examples, None)
    if first is None:
        raise UserError(f"source {source.name} holds no images")
    numbered = enumerate(itertools.chain([first], examples))
    with _packing(folder):
        scans: list[_Scan] = []
        for head in numbered:
            path = folder / f"shard-{len(scans):06d}.tar"
            group = itertools.chain([head], itertools.islice(numbered, per_shard - 1))
            with _naming(path):
                _write_tar(path, group, image_format)
                scans.append(_index(path))
        height, width, depth = first.image.shape
        manifest = Manifest(
            shards=tuple(scan.shard for scan in scans),
            height=height,
            width=width,
            channels=depth,
            classes=_class_names([scan.index for scan in scans], source.classes, source.name),
        )
        with _naming(folder / MANIFEST_NAME):
            manifest.write(folder)
    return manifest


def index_shards(directory: str | os.PathLike[str]) -> Manifest:
    """Index WebDataset shards made elsewhere: one scan of every `*.tar` in a folder.

    A sample is an image with one of the known extensions (the first of `EXTENSIONS` where there are
    several) and a label if there is a `cls` (an integer) or a `json` with an integer `label`, `cls`
    or `class`. Captions (`txt`) and all other members are left alone, and never decoded.

    Raises:
        UserError: no shards, a finished set, a damaged tar (named with the offset), a sample
            without an image, unreadable labels or labels for only some samples, a folder that
            cannot be written.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"no folder of shards at {folder}")
    if (folder / MANIFEST_NAME).exists():
        raise UserError(
            f"{folder} is indexed already; to index it again, delete {folder / MANIFEST_NAME}"
        )
    if (folder / MARKER_NAME).exists():
        raise UserError(f"{folder} is an unfinished set: run make_shards.py on its source again")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar files to index")
    scans = []
    for path in paths:
        with _naming(path):
            scans.append(_index(path))
    if not any(scan.shard.samples for scan in scans):
        raise UserError(f"the shards in {folder} hold no samples")
    shapes = frozenset[tuple[int, int, int]]().union(*(scan.shapes for scan in scans))
    height, width, depth = (
        sides.pop() if len(sides := {shape[axis] for shape in shapes}) == 1 else None
        for axis in range(3)
    )
    manifest = Manifest(
        shards=tuple(scan.shard for scan in scans),
        height=height,
        width=width,
        channels=depth,
        classes=_class_names([scan.index for scan in scans], None, str(folder)),
    )
    with _naming(folder / MANIFEST_NAME):
        manifest.write(folder)
    return manifest


def prepare_shards(directory: str | os.PathLike[str], source: str, size: int | None = None) -> None:
    """Pack a source, named as `open_source` takes it, unless the folder holds a finished set.

    A set that is there is left as it is, whatever it was made from. For one process at a time.

    Raises:
        UserError: as `open_source` and `write_shards`.
    """
    if not (Path(directory) / MANIFEST_NAME).exists():
        write_shards(open_source(source), directory, size)


# Packing


def _uniform(source: Source, size: int | None, channels: int | None) -> Iterator[Example]:
    """The source's examples, converted as asked, all of the first one's shape and labelling."""
    first: Example | None = None
    for example in source.examples:
        image = example.image if channels is None else with_channels(example.image, channels)
        example = example._replace(image=image if size is None else fit(image, size))
        if first is None:
            first = example
        _check_alike(first, example, source)
        yield example


def _check_alike(first: Example, example: Example, source: Source) -> None:
    (height, width, depth), (h, w, d) = first.image.shape, example.image.shape
    if (h, w) != (height, width):
        raise UserError(
            f"images of {source.name} differ in size: {first.key!r} is {height}×{width}, "
            f"{example.key!r} is {h}×{w}; give --size to cut and resize all of them"
        )
    if d != depth:
        raise UserError(
            f"images of {source.name} differ in channels: {first.key!r} has {depth}, "
            f"{example.key!r} has {d}; give --channels 1 (grey) or --channels 3 (RGB)"
        )
    if (example.label is None) != (first.label is None):
        raise UserError(
            f"of {source.name}, only one of {first.key!r} and {example.key!r} has a label: "
            "label all images or none"
        )
    limit = MAX_CLASSES if source.classes is None else len(source.classes)
    if example.label is not None and not 0 <= example.label < limit:
        raise UserError(
            f"label {example.label} of {example.key!r} in {source.name} is not within 0 to "
            f"{limit - 1}"
        )


def _write_tar(path: Path, numbered: Iterable[tuple[int, Example]], image_format: str) -> None:
    # No encoder: TarWriter's own would pickle some extensions. mtime 0: the same bytes every time.
    with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, example in numbered:
            members = {
                "__key__": _member_key(number, example.key),
                image_format: encode(example.image, image_format),
            }
            if example.label is not None:
                members["cls"] = str(example.label).encode("ascii")
            tar.write(members)


def _member_key(number: int, name: str) -> str:
    """A key that is unique, sorts in order, and has no dot, at which WebDataset would split it."""
    key = f"{number:08d}"
    return key if name == key else f"{key}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:]}"


@contextmanager
def _packing(folder: Path) -> Iterator[None]:
    """Claim the output folder for one run, clear what an interrupted one left, mark it finished."""
    marker = folder / MARKER_NAME
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _leftovers(folder)
        lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(lock, folder)
        with _naming(folder):
            # Looked at again: whoever held the lock may have finished meanwhile.
            for name in _leftovers(folder):
                (folder / name).unlink()
            fsync_directory(folder)
            fsync_directory(folder.resolve().parent)
        yield
        with _naming(folder):
            marker.unlink()
            fsync_directory(folder)
    finally:
        os.close(lock)


def _leftovers(folder: Path) -> set[str]:
    """Files that an interrupted run left in an output folder.

    Raises:
        UserError: it holds anything else.
    """
    present = {entry.name for entry in folder.iterdir()}
    if MANIFEST_NAME in present:
        raise UserError(f"{folder} holds a finished set; choose another folder, or delete it")
    foreign = sorted(name for name in present if not _OURS.fullmatch(name))
    if present and (foreign or MARKER_NAME not in present):
        raise UserError(
            f"{folder} is not empty (it holds {(foreign or sorted(present))[0]}): "
            "choose a new or an empty folder"
        )
    return present - {MARKER_NAME}


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is packing into {folder}: wait for it") from error
    except OSError:
        # Some network file systems have no locks; the marker still protects foreign files.
        return


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file the operating system refused to read or write, and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space or raise the limit, then run again" if full else "check the path"
        raise UserError(f"cannot use {path}: {error.strerror or error}; {remedy}") from error


# Indexing


@dataclass(frozen=True)
class TarSample:
    """Where the members of one sample are."""

    key: str
    """WebDataset key: the path up to the first dot."""
    extension: str
    """Of the image."""
    image: tarfile.TarInfo
    """The image's member."""
    label: int
    """-1: none."""
    damage: str | None = None
    """Why the label, which is -1 then, cannot be read."""


@dataclass(frozen=True)
class _Scan:
    """What one scan of a shard finds."""

    shard: Shard
    index: Index
    shapes: frozenset[tuple[int, int, int]]


def scan_tar(path: Path) -> Iterator[TarSample]:
    """Find the samples of a shard, in order.

    Raises:
        UserError: the tar is damaged, compressed or cut short, which the message names with the
            offset; or a sample has no image.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = ((*_split(member.name), member) for member in tar if member.isreg())
            known = ((key, ext, member) for key, ext, member in members if key)
            for key, group in itertools.groupby(known, key=lambda entry: entry[0]):
                yield _sample(path, tar, key, {ext: member for _, ext, member in group})
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a whole, uncompressed tar file ({error}): restore it, or decompress it"
        ) from error


def _split(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset takes them; no key for metadata and nameless files."""
    key, extension = base_plus_ext(name)
    if not key or not extension or name.startswith("__"):
        return "", ""
    return key, extension.lower()


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged header for the end of the archive: the real end is zeros."""
    with open(path, "rb") as file:
        file.seek(offset)
        empty = True
        while piece := file.read(1 << 20):
            if piece.strip(b"\0"):
                raise UserError(
                    f"{path} has a damaged header at or after byte {offset}: restore this shard"
                )
            empty = False
    if empty:
        raise UserError(
            f"{path} ends at byte {offset} without an end of archive: it is cut short; restore it"
        )


def _sample(
    path: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]
) -> TarSample:
    extension = next((known for known in EXTENSIONS if known in members), None)
    if extension is None:
        raise UserError(
            f"sample {key!r} of {path} has no image, only {', '.join(sorted(members))}; "
            f"known are {', '.join(EXTENSIONS)}"
        )
    image = members[extension]
    if image.issparse() or image.size > MAX_PAYLOAD:
        raise UserError(f"image of sample {key!r} in {path} is sparse or over {MAX_PAYLOAD} bytes")
    try:
        return TarSample(key, extension, image, _label(tar, members))
    except (ValueError, RecursionError) as error:
        return TarSample(key, extension, image, -1, f"unreadable label ({error})")


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> int:
    """Label of a sample, or -1.

    Raises:
        ValueError: there is one and it is not an integer within bounds.
    """
    label = None
    if "cls" in members:
        label = int(_read(tar, members["cls"]))
    elif "json" in members:
        content = json.loads(_read(tar, members["json"]))
        if isinstance(content, dict):
            label = next((content[name] for name in _LABEL_NAMES if name in content), None)
    if label is None:
        return -1
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise ValueError(f"label {label!r} is not an integer within 0 to {MAX_CLASSES - 1}")
    return label


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL:
        raise ValueError(f"{member.name} has {member.size} bytes")
    file = tar.extractfile(member)
    assert file is not None, "only regular members are kept"
    return file.read()


def _index(path: Path) -> _Scan:
    """Scan a shard, write its index beside it, and describe both."""
    rows = []
    shapes: set[tuple[int, int, int]] = set()
    with open(path, "rb") as file:
        for sample in scan_tar(path):
            if sample.damage:
                raise UserError(f"sample {sample.key!r} of {path}: {sample.damage}")
            file.seek(sample.image.offset_data)
            payload = file.read(sample.image.size)
            # Undecodable images stay in the index, where reading replaces and reports them.
            with suppress(DecodeError):
                shapes.add(probe(payload, sample.extension))
            key = sample.key.encode("utf-8", "surrogateescape")
            place = sample.image.offset_data, sample.image.size, zlib.crc32(payload)
            rows.append((key, *place, sample.extension.encode("ascii"), sample.label))
    index = np.array(rows, dtype=index_dtype(max((len(row[0]) for row in rows), default=0)))
    name = path.name
    shard = Shard(name, len(rows), path.stat().st_size, sha256_of(path), index_sha256="")
    index_path = path.with_name(shard.index_name)
    with atomic_write(index_path) as index_file:
        np.save(index_file, index, allow_pickle=False)
    return _Scan(replace(shard, index_sha256=sha256_of(index_path)), index, frozenset(shapes))


def _class_names(
    indexes: Sequence[Index], known: tuple[str, ...] | None, source: str
) -> tuple[str, ...] | None:
    """Names of the classes; numbers where the source has no names; None without labels."""
    labels = np.concatenate([index["label"] for index in indexes])
    if np.all(labels < 0):
        return None
    if np.any(labels < 0):
        number = int(np.flatnonzero(labels < 0)[0])
        keys = itertools.chain.from_iterable(index["key"] for index in indexes)
        key = next(itertools.islice(keys, number, None)).decode("utf-8", "replace")
        raise UserError(
            f"of {source}, sample {key!r} has no label while others do: label all or none"
        )
    return known or tuple(str(label) for label in range(int(labels.max()) + 1))
