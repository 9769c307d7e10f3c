"""One error that names all images that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import Pixels, decode
from ddpm_engine.images.folder import extension_in, in_words


def read_image(file: Path, channels: int | None = None) -> Pixels:
    """Decode an image file: uint8 `[H, W, C]`, as `decode` says.

    Raises:
        DecodeError: it is none.
        OSError: it cannot be read.
    """
    return decode(file.read_bytes(), extension_in(file.name), channels)


def reason_of(error: Exception) -> str:
    """Return why an image cannot be read, without its name."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def unreadable(reasons: Mapping[str, str]) -> UserError:
    """Return the error that names images, at least one, and why each cannot be read."""
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        return UserError(f"cannot read image {name}: {reason}; repair or move it")
    listed = in_words((f"{name}: {reason}" for name, reason in reasons.items()), "; ")
    return UserError(f"cannot read {len(reasons)} images: {listed}; repair or move them")
