"""The data of a run: made if asked for, opened, and checked against the network."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from ddpm_engine.config import RunConfig
from ddpm_engine.data import Manifest, ShardDataset, open_shards, prepare_shards
from ddpm_engine.errors import UserError
from ddpm_engine.training.ranks import agreed


def open_dataset(config: RunConfig, accelerator: Accelerator) -> ShardDataset:
    """Open a run's shards, which the main process makes first if they are missing.

    Raises:
        UserError: no shards there, or images or labels that do not fit the network.
    """
    data, model = config.data, config.model
    with agreed(UserError):
        if data.source is not None and accelerator.is_main_process:
            prepare_shards(data.path, data.source, model.sample_size)
    shards = open_shards(data.path)
    _check_images(config, shards.manifest)
    if model.num_class_embeds is not None:
        _check_labels(data.path, shards.highest_label, model.num_class_embeds)
    return ShardDataset(
        shards,
        config.training.seed,
        size=model.sample_size,
        channels=model.in_channels,
        window_shards=data.window_shards,
    )


def _check_images(config: RunConfig, stored: Manifest) -> None:
    """Refuse to resize without a word: images of one size must have the network's."""
    for flag, has, wants in [
        ("model.sample-size", stored.height, config.model.sample_size),
        ("model.sample-size", stored.width, config.model.sample_size),
        ("model.in-channels", stored.channels, config.model.in_channels),
    ]:
        if has is not None and has != wants:
            raise UserError(
                f"images in {config.data.path} are {stored.height}×{stored.width} with "
                f"{stored.channels} channels but --{flag} is {wants}; set it to {has}, or make "
                "the shards anew with launch/make_shards.py --size"
            )


def _check_labels(path: Path, highest_label: int | None, embeddings: int) -> None:
    if highest_label is None:
        raise UserError(
            f"--model.num-class-embeds is {embeddings} but samples in {path} have no labels; make "
            "shards with labels, or leave it unset for an unconditional model"
        )
    if highest_label + 2 > embeddings:
        raise UserError(
            f"--model.num-class-embeds is {embeddings} but labels in {path} go up to "
            f"{highest_label}; it must be at least {highest_label + 2}, one more than the classes, "
            "for the null class"
        )
