"""File formats of samples in a folder: one file each, or shards that hold a range of ids.

The file names say which samples are there, and a name appears only once its file is complete. So
the folder is the only record of what is done, whoever wrote it and however they ended.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from webdataset import TarWriter

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, atomic_write
from ddpm_engine.data.tar import scan_tar
from ddpm_engine.errors import UserError
from ddpm_engine.generation.archives import DamagedArchiveError, read_arrays
from ddpm_engine.images.codec import decode, encode
from ddpm_engine.threads import in_threads
from ddpm_kernels.philox import MAX_SAMPLE_ID

Format = Literal["png", "tar", "tar-npy", "npz"]

MOST_IN_A_FILE = 1 << 24
"""Samples that the name of a file can stand for."""

_NAME = re.compile(r"(\d{8,})(?:-(\d{8,}))?\.(png|tar|npz)")


class About(NamedTuple):
    """What is written beside a sample."""

    seed: int
    """Seed of its noise."""
    label: int | None = None
    """Class that it was conditioned on, or None."""
    prompt: str | None = None
    """Prompt that it was conditioned on, or None."""


class SampleFiles(Protocol):
    """Files of one format."""

    folder: Path
    """Where the files are; created by `write` if missing."""

    def write(self, ids: Sequence[int], images: np.ndarray, about: Sequence[About]) -> None:
        """Write samples, each file complete or not at all.

        Args:
            ids: N ascending ids.
            images: uint8 `[N, H, W, C]`.
            about: each, N of them.

        Raises:
            OSError: as the operating system reports it.
        """
        ...

    def read(self, path: Path) -> Mapping[int, np.ndarray]:
        """Read one file: samples by id, uint8 `[H, W, C]` each.

        Raises:
            Exception: of a damaged file, whatever its format's library raises.
        """
        ...


def sample_files(folder: Path, format: Format) -> SampleFiles:
    """Return the reader and writer of a format.

    Raises:
        UserError: unknown format.
    """
    if format == "png":
        return PngFiles(folder)
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}; it must be one of {', '.join(get_args(Format))}")
    if format == "npz":
        return NpzShards(folder / "shards")
    return TarShards(folder / "shards", "npy" if format == "tar-npy" else "png")


def ids_in(name: str) -> range | None:
    """Return the ids in a file according to its name; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    first, last, _ = found.groups()
    ids = range(int(first), min(int(last or first), MAX_SAMPLE_ID) + 1)
    # A name may say anything: none that this engine gives a file stands for more.
    return ids if len(ids) <= MOST_IN_A_FILE else None


def ids_being_written(name: str) -> range | None:
    """Return the ids in a file that is not complete yet, or never will be; None for other names."""
    whole = name.removesuffix(TEMPORARY_SUFFIX)
    return None if whole == name else ids_in(whole)


def consecutive(ids: Sequence[int]) -> list[slice]:
    """Cut ascending ids at gaps."""
    cuts = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True) if a < b]


class PngFiles:
    """One PNG per sample, `00000017.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, ids: Sequence[int], images: np.ndarray, about: Sequence[About]) -> None:
        """See `SampleFiles`; what is known about them is in the manifest only."""

        def write_one(sample: tuple[int, np.ndarray]) -> None:
            sample_id, image = sample
            with atomic_write(self.folder / f"{sample_id:08d}.png") as file:
                file.write(encode(image, "png"))

        in_threads(write_one, list(zip(ids, images, strict=True)))

    def read(self, path: Path) -> Mapping[int, np.ndarray]:
        """See `SampleFiles`."""
        return {int(path.stem): decode(path.read_bytes(), "png")}


class TarShards:
    """WebDataset shards, `00001024-00002047.tar`: per sample png or npy, json, cls and txt.

    The json holds id, seed and label; there is a cls if there is a label, and a txt if there is a
    prompt.
    """

    def __init__(self, folder: Path, extension: Literal["png", "npy"]) -> None:
        self.folder = folder
        self.extension = extension

    def write(self, ids: Sequence[int], images: np.ndarray, about: Sequence[About]) -> None:
        """See `SampleFiles`; one shard per range without gaps."""
        self.folder.mkdir(exist_ok=True)
        for part in consecutive(ids):
            path = self.folder / f"{ids[part][0]:08d}-{ids[part][-1]:08d}.tar"
            encoded = in_threads(lambda image: encode(image, self.extension), list(images[part]))
            # No encoder: the members are encoded already. mtime 0: the same bytes every time.
            with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
                for k, image, known in zip(ids[part], encoded, about[part], strict=True):
                    description = {"id": k, "seed": known.seed, "label": known.label}
                    members = {
                        "__key__": f"{k:08d}",
                        self.extension: image,
                        "json": json.dumps(description).encode(),
                    }
                    if known.label is not None:
                        members["cls"] = str(known.label).encode()
                    if known.prompt is not None:
                        members["txt"] = known.prompt.encode()
                    tar.write(members)

    def read(self, path: Path) -> Mapping[int, np.ndarray]:
        """See `SampleFiles`."""
        samples = {}
        with path.open("rb") as file:
            for sample in scan_tar(path):
                if sample.image is None:
                    continue  # a latent, which no sample is
                file.seek(sample.image.offset_data)
                payload = file.read(sample.image.size)
                samples[int(sample.key)] = decode(payload, sample.extension)
        return samples


class NpzShards:
    """NumPy archives, `00001024-00002047.npz`.

    Each holds images uint8 `[N, H, W, C]`, ids int64 `[N]` and, if there are classes, labels
    int64 `[N]`, and if there are prompts, these as text `[N]`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, ids: Sequence[int], images: np.ndarray, about: Sequence[About]) -> None:
        """See `SampleFiles`; one archive per range without gaps."""
        self.folder.mkdir(exist_ok=True)
        for part in consecutive(ids):
            arrays = {"images": images[part], "ids": np.asarray(ids[part], dtype=np.int64)}
            known = about[part]
            if known[0].label is not None:
                arrays["labels"] = np.asarray([one.label for one in known], dtype=np.int64)
            if known[0].prompt is not None:
                arrays["prompts"] = np.asarray([one.prompt for one in known])
            encoded = io.BytesIO()
            np.savez(encoded, **arrays)  # type: ignore[arg-type]
            path = self.folder / f"{ids[part][0]:08d}-{ids[part][-1]:08d}.npz"
            with atomic_write(path) as file:
                file.write(encoded.getvalue())

    def read(self, path: Path) -> Mapping[int, np.ndarray]:
        """See `SampleFiles`."""
        ids, images = read_arrays(path, "ids", "images")
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DamagedArchiveError(
                f"its images are {images.dtype} of shape {images.shape}, not uint8 [N, H, W, C]"
            )
        return dict(zip(ids.tolist(), images, strict=True))
