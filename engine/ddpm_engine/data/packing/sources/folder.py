"""Folders of image files, whose subfolders may be classes."""

from __future__ import annotations

import logging
from pathlib import Path

from ddpm_engine.data.packing.sources.captions import FolderCaptions
from ddpm_engine.data.packing.sources.source import (
    DamagedImage,
    Example,
    LazyExamples,
    Source,
    reading,
    revision_of,
)
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import DecodeError
from ddpm_engine.images.damaged import read_image, reason_of
from ddpm_engine.images.folder import check_formats, folder_contents, in_words
from ddpm_engine.printable import printable

logger = logging.getLogger(__name__)

_SPLITS = frozenset({
    "train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout",
})  # fmt: skip


def image_folder(root: Path, out: Path | None = None, captioned: bool = False) -> Source:
    """Open a folder of images, or of class folders, whose sorted names become the labels 0, 1, ...

    Hidden files and folders are left out, and so are folders that this engine wrote and links that
    lead back; see `folder_contents`.

    Args:
        root: the folder.
        out: folder that is about to be written, which is left out too.
        captioned: read captions (see `FolderCaptions`).

    Raises:
        UserError: class folders beside images, an empty class folder, images of formats that
            cannot be read, or images without the captions that were asked for.
    """
    tree = _Tree(root, out)
    with reading(root):
        top = folder_contents(root, out)
    tree.outputs += top.outputs
    tree.others += top.others
    labelled: list[tuple[Path, int | None]] = [(file, None) for file in top.images]
    classes: list[Path] = []
    for folder in top.folders:
        left_out = len(tree.outputs) + len(tree.loops)
        found = tree.images_below(folder)
        if not found and left_out < len(tree.outputs) + len(tree.loops):
            continue
        if found and top.images:
            raise UserError(
                f"{root} holds both class folders ({folder.name}, ...) and images "
                f"({top.images[0].name}, ...): use class folders for all images, or for none"
            )
        check_formats(tree.others, root)
        if not found:
            raise UserError(
                f"class folder {folder} holds no images: fill it, or move it out of {root}"
            )
        labelled += [(file, len(classes)) for file in found]
        classes.append(folder)
    check_formats(tree.others, root)
    names = tuple(printable(folder.name) for folder in classes)
    files = [file for file, _ in labelled]
    captions = FolderCaptions(root, files) if captioned else None
    if captions is not None:
        known = set(captions.files)
        tree.others = [file for file in tree.others if file not in known]
        files += captions.files
    tree.warn()
    _question_splits(root, names)

    def load(number: int) -> Example:
        file, label = labelled[number]
        try:
            image = read_image(file)
        except (DecodeError, OSError) as error:
            raise DamagedImage(str(file), reason_of(error)) from error
        try:
            given = () if captions is None else captions.of(file)
        except (ValueError, OSError) as error:
            raise DamagedImage(str(file), f"captions: {reason_of(error)}") from error
        return Example(file.relative_to(root).with_suffix("").as_posix(), image, label, given)

    examples = LazyExamples(range(len(labelled)), load)
    return Source(str(root), examples, names or None, revision_of(files))


class _Tree:
    """What a walk through the folders below a root has met besides images."""

    def __init__(self, root: Path, out: Path | None) -> None:
        self.root, self.out = root, out
        self.others: list[Path] = []
        self.outputs: list[Path] = []
        self.loops: list[Path] = []
        self._real_root = root.resolve()
        self._entered: set[Path] = set()

    def images_below(self, folder: Path, above: frozenset[Path] | None = None) -> list[Path]:
        """List the images in a folder and in those below it, in the order of their paths.

        Args:
            folder: to list.
            above: real paths of the folders that hold it; None: of the root.
        """
        above = _with_parents(self._real_root) if above is None else above
        real = folder.resolve()
        by_link = real != self._real_root / folder.relative_to(self.root)
        # Among folders that link to each other in circles, there are more ways than can be gone.
        if real in above or (self.loops and by_link and real in self._entered):
            self.loops.append(folder)
            return []
        self._entered.add(real)
        with reading(folder):
            found = folder_contents(folder, self.out)
        self.outputs += found.outputs
        self.others += found.others
        folders = set(found.folders)
        images: list[Path] = []
        for entry in sorted([*found.images, *folders]):
            if entry in folders:
                images += self.images_below(entry, above | _with_parents(real))
            else:
                images.append(entry)
        return images

    def warn(self) -> None:
        """Say what is left out."""
        if self.others:
            logger.warning("left out, as no images: %s", in_words(map(str, self.others)))
        if self.outputs:
            logger.warning("left out, as folders of output: %s", in_words(map(str, self.outputs)))
        if self.loops:
            logger.warning("left out, as links that lead back: %s", in_words(map(str, self.loops)))


def _with_parents(real: Path) -> frozenset[Path]:
    return frozenset({real, *real.parents})


def _question_splits(root: Path, names: tuple[str, ...]) -> None:
    if names and all(name.lower() in _SPLITS for name in names):
        numbered = ", ".join(f"{name} as {number}" for number, name in enumerate(names))
        logger.warning(
            "the folders of %s are taken for classes: %s. If they are splits of one data set, pack "
            "one of them alone, such as %s",
            root, numbered, root / names[0],
        )  # fmt: skip
