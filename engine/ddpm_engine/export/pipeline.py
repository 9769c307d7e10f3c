"""A trained model as a folder that diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ddpm_engine.atomic_io import TEMPORARY_SUFFIX, atomic_write, fsync_directory
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.card import is_export, model_card
from ddpm_engine.interop import network, scheduler
from ddpm_engine.interop.layout import INDEX, NETWORK_CONFIG, SCHEDULER_CONFIG
from ddpm_engine.interop.weights import SAFETENSORS
from ddpm_engine.networks.unet.unet import UNet

_PIPELINES = {scheduler.CLASS: "DDPMPipeline", scheduler.DDIM_CLASS: "DDIMPipeline"}


def export_pipeline(pretrained: LoadedModel, out: Path, weights: str = "ema") -> None:
    """Write a model as a pipeline of diffusers would, and a card; diffusers is not needed.

    A distilled network is a `DDIMPipeline`, any other a `DDPMPipeline`. For an EDM network, which
    no pipeline of diffusers draws with, network and scheduler are written without saying that they
    are one; the card has the loop that draws.

    The folder is written beside `out` and renamed: `out` is whole or not there. An earlier export
    at `out` is replaced.

    Args:
        pretrained: the model.
        out: the folder to make.
        weights: which of the run's weights they are, for the card.

    Raises:
        UserError: diffusers has no such network or no sampler that takes the steps it was distilled
            to, `out` holds something else, or it cannot be written.
    """
    out = out.absolute()
    config = pretrained.config
    if config.distillation.teacher is not None:
        _check_distilled(config)
    shape = network.config_entries(config.model)
    process = scheduler.scheduler_entries(config.diffusion, config.sampling, config.distillation)
    if out.exists() and not is_export(out) and not _is_empty_folder(out):
        raise UserError(
            f"`out` {out} exists and is not an export; choose another, or remove it", "out"
        )
    temporary = out.with_name(out.name + TEMPORARY_SUFFIX)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in (temporary / "unet", temporary / "scheduler"):
            folder.mkdir(parents=True)
        _write_weights(pretrained.model, temporary / "unet" / SAFETENSORS)
        _write_json(temporary / "unet" / NETWORK_CONFIG, shape)
        _write_json(temporary / "scheduler" / SCHEDULER_CONFIG, process)
        sampler = process["_class_name"]
        if sampler in _PIPELINES:
            parts = {"scheduler": ["diffusers", sampler], "unet": ["diffusers", network.CLASS]}
            _write_json(temporary / INDEX, {"_class_name": _PIPELINES[sampler], **parts})
        with atomic_write(temporary / "README.md") as file:
            file.write(model_card(pretrained, weights).encode())
        _put_in_place(temporary, out)
    except OSError as error:
        raise UserError(
            f"writing `out` {out} failed: {error}; make room there, or choose another", "out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_distilled(config: RunConfig) -> None:
    """Refuse what no sampler of diffusers takes the steps of."""
    steps, timesteps, shape = config.sampling.steps, config.diffusion.timesteps, config.model
    if config.distillation.method == "moments":
        reason = "of networks made by moment matching no export is written yet"
    elif config.diffusion.prediction == "edm":
        reason = "EDMEulerScheduler visits other noise levels"
    elif steps is None or timesteps % steps:
        reason = (
            f"DDIMScheduler takes strides of whole timesteps, and {steps} does not divide the "
            f"{timesteps} of the schedule"
        )
    elif shape.out_channels != shape.in_channels:
        reason = "DDIMPipeline does not know networks that predict a variance"
    else:
        return
    raise UserError(
        f"this network was distilled to {steps} steps of {config.sampling.sampler} that no sampler "
        f"of diffusers takes: {reason}. Sample it with this engine, or export its teacher, "
        f"{config.distillation.teacher}"
    )


def _write_weights(model: UNet, file: Path) -> None:
    metadata = {"format": "pt"}  # without it diffusers does not read the file
    if model.conditioning.null_class is not None:
        metadata["null_class"] = str(model.conditioning.null_class)
    # safetensors takes only contiguous tensors; ours are channels-last.
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


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
