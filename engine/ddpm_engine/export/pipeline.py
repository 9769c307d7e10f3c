"""A trained model as a folder that diffusers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, atomic_write, fsync_directory
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.errors import UserError
from ddpm_engine.export.card import is_export, model_card
from ddpm_engine.printable import check_utf8


def export_pipeline(pretrained: LoadedModel, out: Path, weights: str = "ema") -> None:
    """Write a model as a pipeline of diffusers, with a model card; diffusers is not needed.

    The folder, as `LoadedModel.save_pretrained` writes it, is written beside `out` and renamed:
    `out` is whole or not there. An earlier export at `out` is replaced.

    Args:
        pretrained: the model.
        out: the folder to make.
        weights: which of the run's weights they are, for the card.

    Raises:
        UserError: diffusers has no such network or no sampler that takes the steps it was distilled
            to, `out` holds something else, or it cannot be written.
    """
    out = out.absolute()
    check_utf8(out, "out")
    pretrained.check_export()
    if out.exists() and not is_export(out) and not _is_empty_folder(out):
        raise UserError(
            f"`out` {out} exists and is not an export; choose another, or remove it", "out"
        )
    temporary = out.with_name(out.name + TEMPORARY_SUFFIX)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        pretrained.save_pretrained(temporary)
        with atomic_write(temporary / "README.md") as file:
            file.write(model_card(pretrained, weights).encode())
        _put_in_place(temporary, out)
    except OSError as error:
        raise UserError(
            f"writing `out` {out} failed: {error}; make room there, or choose another", "out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, out: Path) -> None:
    for folder in (temporary / "unet", temporary / "scheduler", temporary):
        fsync_directory(folder)
    before = out.with_name(out.name + ".old")
    replaces = is_export(out)
    if replaces:
        # A folder cannot be renamed over a full one. Until the next rename there is none at `out`;
        # the former one is whole in `.old`.
        shutil.rmtree(before, ignore_errors=True)
        os.replace(out, before)
    try:
        os.replace(temporary, out)
    except OSError:
        if replaces:
            os.replace(before, out)
        raise
    fsync_directory(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
