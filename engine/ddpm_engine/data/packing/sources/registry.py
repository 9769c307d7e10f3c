"""Which kind of source a name stands for.

To add a kind, write a module with a function that returns a `Source`, and call it here.
"""

from __future__ import annotations

import os
from pathlib import Path

from ddpm_engine.data.packing.sources.cifar import (
    cifar_archive,
    cifar_file,
    cifar_folder,
    pickled_cifar,
)
from ddpm_engine.data.packing.sources.folder import image_folder
from ddpm_engine.data.packing.sources.huggingface import hugging_face
from ddpm_engine.data.packing.sources.idx import idx_file
from ddpm_engine.data.packing.sources.npz import npz_archive
from ddpm_engine.data.packing.sources.numbers import numbers
from ddpm_engine.data.packing.sources.sklearn import digits, photos
from ddpm_engine.data.packing.sources.source import Source
from ddpm_engine.errors import UserError

KINDS = (
    "a folder of images, an .npz file, CIFAR's binary version (folder, .bin or .tar.gz), "
    "an IDX file, hf:NAME[:SPLIT], digits, numbers, numbers:held-out, or photos"
)


def open_source(
    name: str, out: str | os.PathLike[str] | None = None, captions: bool = False
) -> Source:
    """Open a source of the kind that its name says.

    Args:
        name: one of `KINDS`. CIFAR folders and archives give their training images; name
            `test_batch.bin` or `test.bin` itself for the test images.
        out: folder that is about to be packed into, which is no part of the source.
        captions: read the captions of a folder of images or of a Hugging Face data set; other
            sources give those that they have anyway.

    Raises:
        UserError: nothing there, or nothing that can be read, or no captions that were asked for;
            on access to an example, a damaged image.
    """
    source = _open(name, out, captions)
    if captions and len(source.examples) and not source.examples[0].captions:
        raise UserError(
            f"the source {name} has no captions; give a folder of images with captions, or an hf: "
            "data set with a column of them",
            field="source",
        )
    return source


def _open(name: str, out: str | os.PathLike[str] | None, captions: bool) -> Source:
    if name == "digits":
        return digits()
    if name in ("numbers", "numbers:held-out"):
        return numbers(held_out=name == "numbers:held-out")
    if name == "photos":
        return photos()
    if name.startswith("hf:"):
        return hugging_face(name, captions)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"no source {name!r}; give {KINDS}")
    if path.is_dir():
        if any(path.glob("data_batch_*.bin")) or (path / "train.bin").exists():
            return cifar_folder(path)
        if any((path / known).is_file() for known in ("batches.meta", "meta")):
            raise pickled_cifar(path)
        return image_folder(path, None if out is None else Path(out), captions)
    lower = path.name.lower()
    if lower.endswith(".npz"):
        return npz_archive(path)
    if lower.endswith((".tar.gz", ".tgz")):
        return cifar_archive(path)
    if lower.endswith(".bin"):
        return cifar_file(path)
    if "idx3-ubyte" in lower:
        return idx_file(path)
    raise UserError(f"{path} is no source of a known kind; give {KINDS}")
