"""Images that scikit-learn ships: handwritten digits, and two photographs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ddpm_engine.data.packing.sources.source import Source, array_source

_PHOTO_REDUCTION, _PHOTO_CROP, _PHOTO_STRIDE = 4, 32, 2


def digits() -> Source:
    """Open the 1,797 grey digits of 8 × 8 pixels."""
    import sklearn
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple(map(str, loaded.target_names))
    return array_source("digits", images, loaded.target, names, sklearn.__version__)


def photos() -> Source:
    """Open overlapping squares of two colour photographs, of a temple and of a flower."""
    from sklearn.datasets import load_sample_images

    loaded = load_sample_images()
    crops = []
    for photo in loaded.images:
        height, width = (side // _PHOTO_REDUCTION for side in photo.shape[:2])
        # Reduced, since 32 pixels of the whole photograph would show nothing but a texture.
        whole = photo[: height * _PHOTO_REDUCTION, : width * _PHOTO_REDUCTION]
        reduced = np.asarray(Image.fromarray(whole).reduce(_PHOTO_REDUCTION))
        squares = sliding_window_view(reduced, (_PHOTO_CROP, _PHOTO_CROP), axis=(0, 1))
        squares = squares[::_PHOTO_STRIDE, ::_PHOTO_STRIDE].transpose(0, 1, 3, 4, 2)
        crops.append(squares.reshape(-1, *squares.shape[2:]))
    images = np.concatenate(crops)
    labels = np.repeat(np.arange(len(crops)), [len(squares) for squares in crops])
    names = tuple(Path(name).stem for name in loaded.filenames)
    revision = hashlib.sha256(images.tobytes()).hexdigest()
    return array_source("photos", images, labels, names, revision)
