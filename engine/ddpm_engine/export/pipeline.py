"""A trained model as a folder that diffusers loads."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.errors import UserError
from ddpm_engine.export.card import MARK, model_card
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.networks.files.layout import CARD, is_export
from ddpm_engine.printable import check_utf8


def export_pipeline(pretrained: LoadedModel, out: Path, weights: str = "ema") -> None:
    """Write a model as a pipeline of diffusers, with a model card; diffusers is not needed.

    The files of an earlier export at `out` are replaced, and nothing else in the folder is touched:
    not a `.git`, nor notes. If `out` is a link, they are where it leads. An export that is
    interrupted leaves the earlier one, or a folder that `load` refuses and that the next one
    completes.

    Args:
        pretrained: the model.
        out: the folder to make.
        weights: which of the run's weights they are, for the card.

    Raises:
        UserError: diffusers has no such network or no sampler that takes the steps it was distilled
            to, `out` holds something else, or it cannot be written.
    """
    check_utf8(out, "out")
    pretrained.check_export()
    folder = Path(os.path.realpath(out))
    begins = not is_export(folder)
    if begins and folder.exists() and not _is_free(folder):
        raise UserError(f"`out` {out} exists and is not an export; choose another", "out")
    made = not folder.exists()
    try:
        if begins:
            # Whatever happens from here on, the folder says whose it is.
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / CARD) as file:
                file.write(f"{MARK}\n\nThis export has not finished.\n".encode())
        pretrained.save_pretrained(folder, model_card(pretrained, weights))
    except (OSError, UserError) as error:
        if begins:
            with suppress(OSError):
                (folder / CARD).unlink()
            if made:
                with suppress(OSError):
                    folder.rmdir()
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"writing `out` {out} failed: {error}; make room there, or choose another", "out"
        ) from None


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but hidden files such as `.git`."""
    return folder.is_dir() and all(is_hidden(entry.name) for entry in folder.iterdir())
