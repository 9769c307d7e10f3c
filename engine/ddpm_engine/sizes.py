"""Sizes of images: one number for squares, or height and width."""

from __future__ import annotations

Size = int | tuple[int, int]
"""Side of a square, or `(height, width)`, in pixels."""


def height_and_width(size: Size) -> tuple[int, int]:
    """Return `(height, width)` of a size."""
    return (size, size) if isinstance(size, int) else size


def as_text(size: Size) -> str:
    """Write a size as messages do, such as 16×32."""
    height, width = height_and_width(size)
    return f"{height}×{width}"


def size_of(height: int, width: int) -> Size:
    """Return a height and a width as one size, a square's as one number."""
    return height if height == width else (height, width)
