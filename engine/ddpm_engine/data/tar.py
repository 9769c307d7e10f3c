"""The samples of a WebDataset shard, found without trusting it.

Tars may come from anywhere. Nothing is extracted: members are read in place, and a name is only a
key, so that links, absolute names and `../` mean nothing. Headers, labels and images are bounded in
size, and members already seen are forgotten, so that memory does not grow with their number.
"""

from __future__ import annotations

import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from webdataset.tariterators import base_plus_ext

from ddpm_engine.data.members import EXTENSIONS_BESIDE
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.images.codec import EXTENSIONS

MAX_CLASSES = 1 << 16
MAX_HEADER = 1 << 20
"""Bytes of a member's extended header: its long name and attributes."""
MAX_LABEL = 1 << 20
"""Bytes of a `cls` or `json` member."""
MAX_PAYLOAD = 1 << 28
"""Bytes of one encoded image; the largest npy within the bound on sides is smaller."""

MEMBERS = (*EXTENSIONS, "cls", "json", *EXTENSIONS_BESIDE.values())
"""Extensions that are read; members of all others are skipped."""

logger = logging.getLogger(__name__)

_LABEL_NAMES = ("label", "cls", "class")
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
# What tarfile raises for fields that are no numbers, and for endlessly nested headers.
_MALFORMED = (ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class TarSample:
    """Where the image of one sample is, or the moments of its latents, and its label."""

    key: str
    """WebDataset key: the path up to the first dot."""
    extension: str
    """Of the image; empty if there is none."""
    image: tarfile.TarInfo | None
    """The image's member; None for latents alone."""
    label: int
    """Class; -1: none."""
    beside: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    """Its further members, by their names in `EXTENSIONS_BESIDE`."""
    damage: str | None = None
    """Why the label cannot be read; it is -1 then."""

    @property
    def offset(self) -> int:
        """Where the image begins in the shard, or where the moments of its latents do."""
        return (self.image or self.beside["moments"]).offset_data


class BoundedTarInfo(tarfile.TarInfo):
    """A header that refuses to read further headers of unbounded size into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # The hook that tarfile leaves to subclasses.
        if self.size < 0:
            raise tarfile.ReadError(f"a member of {self.size} bytes")
        if self.type in _EXTENDED and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse member")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *_: object) -> None:
        # The map of a sparse member may be as long as the file.
        raise tarfile.ReadError("a sparse member")


def open_tar(source: Any, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    """Open an uncompressed tar with bounded headers: a path, or a stream to be read forwards.

    Raises:
        tarfile.TarError: its first header is damaged.
        OSError: it cannot be read.
    """
    try:
        if mode == "r|":
            return tarfile.open(fileobj=source, mode="r|", tarinfo=BoundedTarInfo)
        return tarfile.open(source, "r:", tarinfo=BoundedTarInfo)
    except _MALFORMED as error:
        raise tarfile.ReadError(f"a header that cannot be read: {error}") from error


def members_of(
    tar: tarfile.TarFile, left_out: Callable[[str], object] = lambda _: None
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, lower-case extension and header of each member of a sample, in order.

    These are regular members with a key and an extension, except for hidden files, such as what
    macOS leaves (`.DS_Store`, `._0.png`), and WebDataset's own, which begin with `__`. So every
    reader of tars finds the same members.

    Args:
        tar: from `open_tar`.
        left_out: called with the name of each link or device.

    Raises:
        tarfile.TarError: the tar is damaged.
    """
    try:
        end = 0
        while (member := tar.next()) is not None:
            if tar.offset <= end:
                raise tarfile.ReadError(f"a member at byte {member.offset} that ends before it")
            end = tar.offset
            tar.members = []  # type: ignore[attr-defined]
            hidden = is_hidden(PurePosixPath(member.name).name)
            if hidden or member.isdir() or member.name.startswith("__"):
                continue
            key, extension = base_plus_ext(member.name)
            if not member.isreg():
                left_out(member.name)
            elif key and extension:
                yield key, extension.lower(), member
    except _MALFORMED as error:
        raise tarfile.ReadError(f"a header that cannot be read: {error}") from error


def belongs_to_sample(extension: str) -> bool:
    """Whether a member makes a sample: its image, latents or label, or a misnamed image.

    The key ends at the first dot: of `img.v2.jpg`, the extension is `v2.jpg`, which is none. What
    stands beside an image, such as its captions, makes no sample by itself.
    """
    if extension in EXTENSIONS_BESIDE.values():
        return extension == EXTENSIONS_BESIDE["moments"]
    return extension in MEMBERS or extension.rpartition(".")[2] in EXTENSIONS


def scan_tar(path: Path) -> Iterator[TarSample]:
    """Find the samples of a shard, in order.

    Whatever has no image, latents or label, such as `README.txt`, is no sample; it is left out,
    with a warning.

    Raises:
        UserError: the tar is damaged, compressed or cut short, which the message names with the
            offset; or a sample has no image, or a member twice.
    """
    left_out = _LeftOut()
    try:
        with open_tar(path, "r:") as tar:
            members = members_of(tar, left_out)
            for key, group in itertools.groupby(members, key=lambda entry: entry[0]):
                sample = _sample(path, tar, key, group, left_out)
                if sample is not None:
                    yield sample
            _check_end(path, tar.offset)
        left_out.report(path)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a whole, uncompressed tar file ({error}): restore it, or decompress it"
        ) from error


class _LeftOut:
    """Counts members that are left out."""

    def __init__(self) -> None:
        self._count = 0
        self._first = ""

    def __call__(self, name: str) -> None:
        self._count += 1
        self._first = self._first or name[-80:]

    def report(self, path: Path) -> None:
        if self._count:
            logger.warning(
                "left out of %s what is no image nor a label of one: %d members, such as %r",
                path, self._count, self._first,
            )  # fmt: skip


def label_of(members: dict[str, bytes]) -> int:
    """Return the label of a sample, or -1 if it has none.

    Args:
        members: content of its `cls` or `json` member, if it has them.

    Raises:
        ValueError: there is a label and it is not an integer within bounds.
    """
    label = None
    if "cls" in members:
        label = int(members["cls"])
    elif "json" in members:
        try:
            content = json.loads(members["json"])
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
        if isinstance(content, dict):
            label = next((content[name] for name in _LABEL_NAMES if name in content), None)
    if label is None:
        return -1
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise ValueError(f"label {label!r} is not an integer within 0 to {MAX_CLASSES - 1}")
    return label


def _check_end(path: Path, offset: int) -> None:
    """Check that zeros follow: tarfile takes a damaged header for the end of the archive."""
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
    path: Path,
    tar: tarfile.TarFile,
    key: str,
    group: Iterator[tuple[str, str, tarfile.TarInfo]],
    left_out: Callable[[str], object],
) -> TarSample | None:
    known: dict[str, tarfile.TarInfo] = {}
    others: set[str] = set()
    twice: UserError | None = None
    name, is_sample = key, False
    for _, extension, member in group:
        name, is_sample = member.name, is_sample or belongs_to_sample(extension)
        if extension in known and twice is None:
            twice = UserError(
                f"sample {key!r} of {path} has two members {extension!r}, the second at byte "
                f"{member.offset}: pack this shard again under names that differ"
            )
        if extension in MEMBERS:
            known[extension] = member
        elif len(others) < 5:
            others.add(extension[:20])
    if not is_sample:
        left_out(name)
        return None
    if twice is not None:
        raise twice
    found = next((extension for extension in EXTENSIONS if extension in known), None)
    if found is None and EXTENSIONS_BESIDE["moments"] not in known:
        raise UserError(
            f"sample {key!r} of {path} has no image, only {', '.join(sorted({*known, *others}))}; "
            f"known are {', '.join(EXTENSIONS)}"
        )
    image = None if found is None else known[found]
    if image is not None and (image.issparse() or image.size > MAX_PAYLOAD):
        raise UserError(f"image of sample {key!r} in {path} is sparse or over {MAX_PAYLOAD} bytes")
    beside = {
        name: known[extension]
        for name, extension in EXTENSIONS_BESIDE.items()
        if extension in known
    }
    try:
        labels: dict[str, bytes] = {
            name: _read(tar, known[name]) for name in ("cls", "json") if name in known
        }
        return TarSample(key, found or "", image, label_of(labels), beside)
    except ValueError as error:
        return TarSample(key, found or "", image, -1, beside, f"unreadable label ({error})")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL:
        raise ValueError(f"{member.name} has {member.size} bytes")
    file = tar.extractfile(member)
    assert file is not None, "only regular members are kept"
    return file.read()
