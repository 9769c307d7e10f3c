"""Where images come from before they are packed: folders, arrays, the classic archives, the hub.

Every source yields the same thing, an `Example` with a key, a uint8 array and perhaps a label. To
add one, write a function that returns a `Source` and give it a line in `open_source`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import EXTENSIONS, DecodeError, Pixels, decode, extension_of

KINDS = (
    "a folder of images, an .npz file, CIFAR's binary version (folder, .bin or .tar.gz), "
    "an IDX file, hf:NAME[:SPLIT], digits, or photos"
)

_NPZ_IMAGES = ("images", "x", "data", "arr_0")
_NPZ_LABELS = ("labels", "label", "y", "arr_1")
_CIFAR_PIXELS = 3 * 32 * 32
_PHOTO_REDUCTION, _PHOTO_CROP, _PHOTO_STRIDE = 4, 32, 2
_IDX_MAGIC = {3: 0x00000803, 1: 0x00000801}


class Example(NamedTuple):
    """One image of a source."""

    key: str
    """What the source calls it; named in error messages."""
    image: Pixels
    """uint8 `[H, W, C]`."""
    label: int | None
    """Class from 0, or None."""


class LazyExamples(Sequence[Example]):
    """Examples that are loaded when they are looked at, each time anew.

    Args:
        places: what `load` is called with, in order.
        load: from a place to its example.
    """

    def __init__(self, places: range, load: Callable[[int], Example]) -> None:
        self._places = places
        self._load = load

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> LazyExamples: ...
    def __getitem__(self, place: int | slice) -> Example | LazyExamples:
        if isinstance(place, slice):
            return LazyExamples(self._places[place], self._load)
        return self._load(self._places[place])


@dataclass(frozen=True)
class Source:
    """Images to be packed."""

    name: str
    """What the user called it."""
    examples: Sequence[Example]
    """The images in order, each reachable without the ones before it."""
    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ..., where the source knows them."""
    revision: str | None = None
    """Equal for equal images: an interrupted run goes on only from the revision that it began with.
    None: not known."""


def open_source(name: str) -> Source:
    """Find out what `name` is and open it.

    Args:
        name: one of `KINDS`. CIFAR folders and archives give their training images; name
            `test_batch.bin` or `test.bin` itself for the test images.

    Raises:
        UserError: nothing there, or nothing that can be read; while iterating, a damaged image.
    """
    if name == "digits":
        return _digits()
    if name == "photos":
        return _photos()
    if name.startswith("hf:"):
        return _hugging_face(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"no source {name!r}: give {KINDS}")
    if path.is_dir():
        if any(path.glob("data_batch_*.bin")) or (path / "train.bin").exists():
            return _cifar_folder(path)
        if any((path / known).is_file() for known in ("batches.meta", "meta")):
            raise _pickled_cifar(path)
        return _folder(path)
    lower = path.name.lower()
    if lower.endswith(".npz"):
        return _npz(path)
    if lower.endswith((".tar.gz", ".tgz")):
        return _cifar_archive(path)
    if lower.endswith(".bin"):
        return _cifar_file(path)
    if "idx3-ubyte" in lower:
        return _idx(path)
    raise UserError(f"{path} is not a source this engine knows: give {KINDS}")


def _array_source(
    name: str,
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[Any] | None,
    classes: tuple[str, ...] | None,
    revision: str,
) -> Source:
    """A source over uint8 `[N, H, W, C]` and integers `[N]`."""

    def load(number: int) -> Example:
        label = None if labels is None else int(labels[number])
        return Example(f"{number:08d}", images[number], label)

    return Source(name, LazyExamples(range(len(images)), load), classes, revision)


def _revision(files: Iterable[Path]) -> str:
    """Hash of files' names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        with _reading(file):
            status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


# What scikit-learn ships


def _digits() -> Source:
    import sklearn
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple(map(str, digits.target_names))
    return _array_source("digits", images, digits.target, names, sklearn.__version__)


def _photos() -> Source:
    """Overlapping squares of two colour photographs, of a temple and of a flower."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    crops = []
    for photo in photos.images:
        height, width = (side // _PHOTO_REDUCTION for side in photo.shape[:2])
        # Of the whole photograph, 32 pixels would show nothing but a texture.
        whole = photo[: height * _PHOTO_REDUCTION, : width * _PHOTO_REDUCTION]
        reduced = np.asarray(Image.fromarray(whole).reduce(_PHOTO_REDUCTION))
        squares = sliding_window_view(reduced, (_PHOTO_CROP, _PHOTO_CROP), axis=(0, 1))
        squares = squares[::_PHOTO_STRIDE, ::_PHOTO_STRIDE].transpose(0, 1, 3, 4, 2)
        crops.append(squares.reshape(-1, *squares.shape[2:]))
    images = np.concatenate(crops)
    labels = np.repeat(np.arange(len(crops)), [len(squares) for squares in crops])
    names = tuple(Path(name).stem for name in photos.filenames)
    revision = hashlib.sha256(images.tobytes()).hexdigest()
    return _array_source("photos", images, labels, names, revision)


# Folders of images


def _folder(root: Path) -> Source:
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
            raise UserError(f"class folder {folder} holds no images: fill it or remove it")
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
            raise UserError(f"cannot read image {file}: {error}; repair or remove it") from error
        return Example(file.relative_to(root).with_suffix("").as_posix(), image, label)

    examples = LazyExamples(range(len(labelled)), load)
    classes = tuple(folder.name for folder in folders) or None
    return Source(str(root), examples, classes, _revision(file for file, _ in labelled))


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder in sorted order, leaving out hidden files and folders."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            found += _visible_files(entry) if entry.is_dir() else [entry]
    return found


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()


# NumPy archives


def _npz(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images_name = next((n for n in _NPZ_IMAGES if n in archive.files), None)
            labels_name = next((n for n in _NPZ_LABELS if n in archive.files), None)
            if images_name is None:
                raise UserError(
                    f"{path} holds {', '.join(archive.files) or 'nothing'}: name the image array "
                    f"{' or '.join(_NPZ_IMAGES)}"
                )
            images = archive[images_name]
            labels = None if labels_name is None else archive[labels_name]
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; save it again without pickles") from error
    shape = f"{path}: {images_name} is {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8:
        raise UserError(f"{shape}; convert it to uint8 in 0..255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"{shape}; it must be [N, H, W], [N, H, W, 1] or [N, H, W, 3]")
    if labels is not None:
        labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{path}: {labels_name} is {labels.dtype} {list(labels.shape)}; "
                f"it must be integers [{len(images)}], one for each image"
            )
    return _array_source(str(path), images, labels, None, _revision([path]))


# CIFAR-10 and CIFAR-100, binary version


def _pickled_cifar(path: Path) -> UserError:
    return UserError(
        f"{path} is CIFAR's Python version, whose pickles could execute code; give the binary "
        "version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) from the same page"
    )


def _cifar_folder(root: Path) -> Source:
    files = sorted(root.glob("data_batch_*.bin")) or [root / "train.bin"]
    return _cifar_files(str(root), files)


def _cifar_file(path: Path) -> Source:
    return _cifar_files(str(path), [path])


def _cifar_files(name: str, files: list[Path]) -> Source:
    parts = {}
    for file in files:
        with _reading(file):
            parts[file.name] = file.read_bytes()
    names_file = files[0].parent / _cifar_names(files[0].name)
    names = names_file.read_bytes() if names_file.is_file() else None
    return _cifar(name, parts, names, _revision(files))


def _cifar_archive(path: Path) -> Source:
    parts: dict[str, bytes] = {}
    names: dict[str, bytes] = {}
    with _reading(path), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            base = Path(member.name).name
            if base in ("batches.meta", "meta"):
                raise _pickled_cifar(path)
            wanted = base == "train.bin" or (base.startswith("data_batch_") and base[-4:] == ".bin")
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and wanted:
                parts[base] = file.read()
            elif file is not None and base.endswith(".txt"):
                names[base] = file.read()
    if not parts:
        raise UserError(f"{path} holds no data_batch_*.bin or train.bin: give {KINDS}")
    parts = dict(sorted(parts.items()))
    class_names = names.get(_cifar_names(next(iter(parts))))
    return _cifar(str(path), parts, class_names, _revision([path]))


def _is_cifar100(file_name: str) -> bool:
    return file_name in ("train.bin", "test.bin")


def _cifar_names(file_name: str) -> str:
    return "fine_label_names.txt" if _is_cifar100(file_name) else "batches.meta.txt"


def _cifar(name: str, parts: dict[str, bytes], names: bytes | None, revision: str) -> Source:
    """Records of label bytes (CIFAR-100: coarse, then fine) and planes of red, green, blue."""
    images, labels = [], []
    for file_name, content in parts.items():
        head = 2 if _is_cifar100(file_name) else 1
        if not content or len(content) % (head + _CIFAR_PIXELS):
            raise UserError(
                f"{file_name} of {name} has {len(content)} bytes, not a multiple of "
                f"{head + _CIFAR_PIXELS}: it is damaged or not CIFAR; download it again"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, head + _CIFAR_PIXELS)
        labels.append(records[:, head - 1])
        images.append(records[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes = tuple(names.decode("utf-8", "replace").split()) if names else None
    return _array_source(name, np.concatenate(images), np.concatenate(labels), classes, revision)


# IDX (MNIST and its relatives)


def _idx(path: Path) -> Source:
    images = _read_idx(path, dimensions=3)[..., None]
    labels_path = _idx_labels(path)
    labels = None if labels_path is None else _read_idx(labels_path, dimensions=1)
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f"{labels_path} has {len(labels)} labels for the {len(images)} images of {path}: "
            "give matching files, or move the labels away"
        )
    files = [path] if labels_path is None else [path, labels_path]
    return _array_source(str(path), images, labels, None, _revision(files))


def _idx_labels(path: Path) -> Path | None:
    """The labels file beside an images file, compressed or not."""
    base = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = (path.with_name(base), path.with_name(base + ".gz"))
    return next((c for c in candidates if c.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    with _reading(path):
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    head = 4 * (1 + dimensions)
    if len(content) < head or int.from_bytes(content[:4], "big") != _IDX_MAGIC[dimensions]:
        raise UserError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - head != math.prod(shape):
        raise UserError(
            f"{path} claims {list(shape)} but holds {len(content) - head} bytes: download it again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong while reading it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot read {path}: {error}; it may be damaged") from error


# Hugging Face datasets


def _hugging_face(name: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} needs Hugging Face's library: pip install 'ddpm-engine[huggingface]'"
        ) from error
    where, _, split = name.removeprefix("hf:").partition(":")
    split = split or "train"
    if not where:
        raise UserError(f"{name!r} names no data set: write hf:NAME or hf:NAME:SPLIT")
    # Downloading, parsing and splitting fail in more ways than the library has error classes.
    try:
        if (Path(where) / "state.json").is_file():
            table = datasets.load_from_disk(where)
        elif (Path(where) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(where)[split]
        else:
            table = datasets.load_dataset(where, split=split)
    except Exception as error:
        raise UserError(f"cannot load {name} (split {split!r}): {error}") from error

    columns = table.features
    image = next((c for c, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"{name} has no image column, only {', '.join(columns) or 'nothing'}")
    label, classes = _hugging_face_label(columns, datasets.ClassLabel)
    # Undecoded: its bytes go through this engine's own table of formats.
    table = table.select_columns([image] if label is None else [image, label])
    table = table.cast_column(image, datasets.Image(decode=False))

    def load(number: int) -> Example:
        row = table[number]
        try:
            payload = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
            pixels = decode(payload, extension_of(payload))
        except (DecodeError, OSError, TypeError) as error:
            raise UserError(f"cannot read image {number} of {name}: {error}") from error
        # Hidden labels of a test split are None or -1.
        known = label is not None and row[label] is not None and row[label] >= 0
        return Example(f"{number:08d}", pixels, int(row[label]) if known else None)

    return Source(name, LazyExamples(range(len(table)), load), classes, table._fingerprint)


def _hugging_face_label(
    columns: dict[str, Any], class_label: type
) -> tuple[str | None, tuple[str, ...] | None]:
    """The label column and its class names: a ClassLabel, else integers called label(s)."""
    for column, kind in columns.items():
        if isinstance(kind, class_label):
            return column, tuple(kind.names)  # type: ignore[attr-defined]
    for column in ("label", "labels"):
        if "int" in str(getattr(columns.get(column), "dtype", "")):
            return column, None
    return None, None
