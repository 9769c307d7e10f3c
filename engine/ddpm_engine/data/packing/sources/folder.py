"""Folders of image files, whose subfolders may be classes."""

from __future__ import annotations

from pathlib import Path

from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source, revision_of
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, decode


def image_folder(root: Path) -> Source:
    """Open a folder of images, or of class folders, whose sorted names become the labels 0, 1, ...

    Hidden files and folders are left out.

    Raises:
        UserError: class folders beside files, an empty class folder, or a file that is no image.
    """
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    if folders and files:
        raise UserError(
            f"{root} holds both class folders ({folders[0].name}, ...) and files "
            f"({files[0].name}, ...): use class folders for all images, or for none"
        )
    labelled: list[tuple[Path, int | None]] = [(file, None) for file in files]
    for label, folder in enumerate(folders):
        found = _visible_files(folder)
        if not found:
            raise UserError(
                f"class folder {folder} holds no images: fill it, or move it out of {root}"
            )
        labelled += [(file, label) for file in found]
    strays = [file for file, _ in labelled if _extension(file) not in EXTENSIONS]
    if strays:
        others = f", nor are {len(strays) - 1} more" if len(strays) > 1 else ""
        raise UserError(
            f"{strays[0]} is not an image ({', '.join(EXTENSIONS)}){others}: move it out of "
            f"{root}, hide it with a leading dot, or convert it"
        )

    def load(number: int) -> Example:
        file, label = labelled[number]
        try:
            image = decode(file.read_bytes(), _extension(file))
        except (DecodeError, OSError) as error:
            raise UserError(f"cannot read image {file}: {error}; repair or move it") from error
        return Example(file.relative_to(root).with_suffix("").as_posix(), image, label)

    examples = LazyExamples(range(len(labelled)), load)
    classes = tuple(folder.name for folder in folders) or None
    return Source(str(root), examples, classes, revision_of(file for file, _ in labelled))


def _visible_files(folder: Path) -> list[Path]:
    """List all files below a folder in sorted order, without hidden files and folders."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            found += _visible_files(entry) if entry.is_dir() else [entry]
    return found


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()
