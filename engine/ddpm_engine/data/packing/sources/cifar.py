"""CIFAR-10 and CIFAR-100, binary version."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from ddpm_engine.data.packing.sources.source import Source, array_source, reading, revision_of
from ddpm_engine.errors import UserError

_PIXELS = 3 * 32 * 32


def pickled_cifar(path: Path) -> UserError:
    """Return the error that refuses CIFAR's Python version."""
    return UserError(
        f"{path} is CIFAR's Python version, whose pickles could execute code; give the binary "
        "version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) from the same page"
    )


def cifar_folder(root: Path) -> Source:
    """Open the training images of an unpacked archive.

    Raises:
        UserError: a file that cannot be read, or is no binary CIFAR.
    """
    files = sorted(root.glob("data_batch_*.bin")) or [root / "train.bin"]
    return _read_files(str(root), files)


def cifar_file(path: Path) -> Source:
    """Open the images of one .bin file.

    Raises:
        UserError: it cannot be read, or is no binary CIFAR.
    """
    return _read_files(str(path), [path])


def _read_files(name: str, files: list[Path]) -> Source:
    parts = {}
    for file in files:
        with reading(file):
            parts[file.name] = file.read_bytes()
    names_file = files[0].parent / _names_file(files[0].name)
    names = names_file.read_bytes() if names_file.is_file() else None
    return _parse(name, parts, names, revision_of(files))


def cifar_archive(path: Path) -> Source:
    """Open the training images of a .tar.gz.

    Raises:
        UserError: it cannot be read, or holds no binary CIFAR.
    """
    parts: dict[str, bytes] = {}
    names: dict[str, bytes] = {}
    with reading(path), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            base = Path(member.name).name
            if base in ("batches.meta", "meta"):
                raise pickled_cifar(path)
            wanted = base == "train.bin" or (base.startswith("data_batch_") and base[-4:] == ".bin")
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and wanted:
                parts[base] = file.read()
            elif file is not None and base.endswith(".txt"):
                names[base] = file.read()
    if not parts:
        raise UserError(
            f"{path} holds no data_batch_*.bin or train.bin: give CIFAR's binary version"
        )
    parts = dict(sorted(parts.items()))
    class_names = names.get(_names_file(next(iter(parts))))
    return _parse(str(path), parts, class_names, revision_of([path]))


def _is_cifar100(file_name: str) -> bool:
    return file_name in ("train.bin", "test.bin")


def _names_file(file_name: str) -> str:
    return "fine_label_names.txt" if _is_cifar100(file_name) else "batches.meta.txt"


def _parse(name: str, parts: dict[str, bytes], names: bytes | None, revision: str) -> Source:
    """Parse records of label bytes (CIFAR-100: coarse, fine) and planes of red, green, blue."""
    images, labels = [], []
    for file_name, content in parts.items():
        head = 2 if _is_cifar100(file_name) else 1
        if not content or len(content) % (head + _PIXELS):
            raise UserError(
                f"{file_name} of {name} has {len(content)} bytes, not a multiple of "
                f"{head + _PIXELS}: it is damaged or not CIFAR; download it again"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, head + _PIXELS)
        labels.append(records[:, head - 1])
        images.append(records[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes = tuple(names.decode("utf-8", "replace").split()) if names else None
    return array_source(name, np.concatenate(images), np.concatenate(labels), classes, revision)
