"""Data sets of the Hugging Face hub, or saved to disk by its library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_engine.data.members import encode_captions
from ddpm_engine.data.packing.sources.captions import FIELDS, captions_in
from ddpm_engine.data.packing.sources.source import DamagedImage, Example, LazyExamples, Source
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import DecodeError, decode, extension_of
from ddpm_engine.images.damaged import reason_of


def hugging_face(name: str, captioned: bool = False) -> Source:
    """Open `hf:NAME[:SPLIT]`: a data set's first image column, and its labels if it has any.

    Args:
        name: of the data set on the hub, or a folder that its library saved.
        captioned: read captions too: the first column called as one of `FIELDS` says, of strings
            or of lists of them.

    Raises:
        UserError: the library is missing, or the data set cannot be loaded, or has no images or
            no captions.
    """
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
    label, classes = _label_column(columns, datasets.ClassLabel)
    caption = _caption_column(name, columns) if captioned else None
    # Undecoded: the bytes go through this engine's own table of formats.
    table = table.select_columns([column for column in (image, label, caption) if column])
    table = table.cast_column(image, datasets.Image(decode=False))

    def load(number: int) -> Example:
        row = table[number]
        try:
            payload = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
            pixels = decode(payload, extension_of(payload))
        except (DecodeError, OSError, TypeError) as error:
            raise DamagedImage(f"{number} of {name}", reason_of(error)) from error
        # Hidden labels of a test split are None or -1.
        known = label is not None and row[label] is not None and row[label] >= 0
        captions = () if caption is None else _captions(f"{number} of {name}", row[caption])
        return Example(f"{number:08d}", pixels, int(row[label]) if known else None, captions)

    return Source(name, LazyExamples(range(len(table)), load), classes, table._fingerprint)


def _caption_column(name: str, columns: dict[str, Any]) -> str:
    found = next((column for column in FIELDS if column in columns), None)
    if found is None:
        raise UserError(
            f"{name} has no column of captions ({', '.join(FIELDS)}), only {', '.join(columns)}; "
            "rename its column"
        )
    return found


def _captions(name: str, value: Any) -> tuple[str, ...]:
    try:
        captions = captions_in(value)
        encode_captions(captions)
    except ValueError as error:
        raise DamagedImage(name, f"captions: {error}") from error
    return captions


def _label_column(
    columns: dict[str, Any], class_label: type
) -> tuple[str | None, tuple[str, ...] | None]:
    """Find the label column and its class names: a ClassLabel, else integers called label(s)."""
    for column, kind in columns.items():
        if isinstance(kind, class_label):
            return column, tuple(kind.names)  # type: ignore[attr-defined]
    for column in ("label", "labels"):
        if "int" in str(getattr(columns.get(column), "dtype", "")):
            return column, None
    return None, None
