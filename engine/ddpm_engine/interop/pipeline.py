"""A network and its process as a pipeline of diffusers, which need not be installed."""

from __future__ import annotations

from pathlib import Path

from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.interop import scheduler
from ddpm_engine.networks.files.layout import CARD, INDEX, NETWORK_CONFIG, SCHEDULER_CONFIG
from ddpm_engine.networks.files.together import json_writer, text_writer, write_together
from ddpm_engine.networks.files.weights import check_no_other_weights
from ddpm_engine.networks.unet import files
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.samplers.config import SamplingConfig

_PIPELINES = {scheduler.CLASS: "DDPMPipeline", scheduler.DDIM_CLASS: "DDIMPipeline"}


def check_pipeline(
    network: object,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
) -> UNetConfig:
    """Check that diffusers has such a network and a sampler for it.

    Args:
        network: configuration of the network.
        diffusion: its process.
        sampling: how it is sampled.
        distillation: how it was distilled, if it was.

    Returns:
        The network's configuration.

    Raises:
        UserError: diffusers has no such network, or no sampler that takes the steps it was
            distilled to.
    """
    if not isinstance(network, UNetConfig):
        raise UserError(
            f"the network is a {type(network).__name__}, and only U-Nets are written for diffusers"
        )
    if distillation.teacher is not None:
        _check_distilled(network, diffusion, sampling, distillation)
    files.config_entries(network)
    return network


def write_pipeline(
    folder: Path,
    network: UNet,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
    card: str | None = None,
) -> None:
    """Write a model as a pipeline of diffusers; other files in the folder stay.

    A distilled network is a `DDIMPipeline`, any other a `DDPMPipeline`. For an EDM network, which
    no pipeline of diffusers samples from, network and scheduler are written without an index.

    Args:
        folder: created if missing.
        network: the network.
        diffusion: its process.
        sampling: how it is sampled.
        distillation: how it was distilled, if it was.
        card: text of its README.md.

    Raises:
        UserError: as `check_pipeline`, or the folder holds parts of a model of another kind.
        OSError: the folder cannot be written.
    """
    check_pipeline(network.config, diffusion, sampling, distillation)
    process = scheduler.scheduler_entries(diffusion, sampling, distillation)
    _check_parts(folder)
    null_class = network.conditioning.null_class
    unet = files.unet_writers(network.config, network.state_dict(), null_class)
    writers = {f"unet/{name}": writer for name, writer in unet.items()}
    writers[f"scheduler/{SCHEDULER_CONFIG}"] = json_writer(process)
    if card is not None:
        writers[CARD] = text_writer(card)
    entries = [f"unet/{NETWORK_CONFIG}"]
    sampler = process["_class_name"]
    if sampler in _PIPELINES:
        parts = {"scheduler": ["diffusers", sampler], "unet": ["diffusers", files.CLASS]}
        writers[INDEX] = json_writer({"_class_name": _PIPELINES[sampler], **parts})
        entries.append(INDEX)
    write_together(folder, writers, entries, obsolete=[INDEX])


def _check_parts(folder: Path) -> None:
    """Refuse a folder in which something else would be read, or written, in place of the parts."""
    for name in ("unet", "scheduler"):
        part = folder / name
        if part.is_symlink() or (part.exists() and not part.is_dir()):
            raise UserError(
                f"{part} is {'a link' if part.is_symlink() else 'a file'}, and a folder of that "
                "name is to be written; move it elsewhere, or choose another folder"
            )
    if (folder / "unet_ema").exists():
        raise UserError(
            f"{folder / 'unet_ema'} would be read in place of the new network; move it elsewhere, "
            "or choose another folder"
        )
    check_no_other_weights(folder / "unet")


def _check_distilled(
    network: UNetConfig,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
) -> None:
    """Refuse a distilled network whose steps no sampler of diffusers takes."""
    steps, timesteps = sampling.steps, diffusion.timesteps
    if distillation.method == "moments":
        reason = "of networks made by moment matching no export is written yet"
    elif diffusion.prediction == "edm":
        reason = "EDMEulerScheduler visits other noise levels"
    elif steps is None or timesteps % steps:
        reason = (
            f"DDIMScheduler takes strides of whole timesteps, and {steps} does not divide the "
            f"{timesteps} of the schedule"
        )
    elif network.out_channels != network.in_channels:
        reason = "DDIMPipeline does not know networks that predict a variance"
    else:
        return
    raise UserError(
        f"this network was distilled to {steps} steps of {sampling.sampler} that no sampler "
        f"of diffusers takes: {reason}. Sample from it with this engine, or export its teacher, "
        f"{distillation.teacher}"
    )
