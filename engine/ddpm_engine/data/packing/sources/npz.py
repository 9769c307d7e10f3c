"""NumPy archives of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ddpm_engine.data.packing.sources.source import Source, array_source, revision_of
from ddpm_engine.errors import UserError

_IMAGES = ("images", "x", "data", "arr_0")
_LABELS = ("labels", "label", "y", "arr_1")


def npz_archive(path: Path) -> Source:
    """Open an npz file of uint8 images `[N, H, W]` or `[N, H, W, 1 or 3]` and perhaps labels `[N]`.

    Raises:
        UserError: it cannot be read, or its arrays are of other names, types or shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images_name = next((n for n in _IMAGES if n in archive.files), None)
            labels_name = next((n for n in _LABELS if n in archive.files), None)
            if images_name is None:
                raise UserError(
                    f"{path} holds {', '.join(archive.files) or 'nothing'}: name the image array "
                    f"{' or '.join(_IMAGES)}"
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
    return array_source(str(path), images, labels, None, revision_of([path]))
