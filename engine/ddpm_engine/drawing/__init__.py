"""Pictures in numbers: what picture k is, which process draws it, and where it is kept."""

from ddpm_engine.drawing.fill import fill
from ddpm_engine.drawing.picture_files import Format
from ddpm_engine.drawing.picture_set import PictureSet
from ddpm_engine.drawing.recipe import Drawing, Recipe
from ddpm_engine.drawing.references import DrawnImages, ReferenceImages, read_mask, small_images
from ddpm_engine.drawing.stored_pictures import StoredPictures, open_pictures

__all__ = [
    "Drawing",
    "DrawnImages",
    "Format",
    "PictureSet",
    "Recipe",
    "ReferenceImages",
    "StoredPictures",
    "fill",
    "open_pictures",
    "read_mask",
    "small_images",
]
