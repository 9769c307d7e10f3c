"""A network and its process as a pipeline of diffusers, which need not be installed."""

from __future__ import annotations

from pathlib import Path

from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.interop import latent_parts, scheduler
from ddpm_engine.interop.latent_parts import Further
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.files.layout import (
    CARD,
    INDEX,
    NETWORK_CONFIG,
    PARTS,
    SCHEDULER_CONFIG,
    averaged_part,
)
from ddpm_engine.networks.files.together import json_writer, text_writer, write_together
from ddpm_engine.networks.files.weights import check_no_other_weights
from ddpm_engine.networks.stored import StoredNetwork
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.samplers.config import SamplingConfig


def check_pipeline(
    network: Network,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
) -> StoredNetwork:
    """Check that diffusers has such a network and a sampler for it.

    Args:
        network: the network.
        diffusion: its process.
        sampling: how it is sampled.
        distillation: how it was distilled, if it was.

    Returns:
        The network.

    Raises:
        UserError: diffusers has no such network, or no sampler that takes the steps it was
            distilled to.
    """
    if not isinstance(network, StoredNetwork):
        raise UserError(f"the network is a {type(network).__name__}, which diffusers does not have")
    if distillation.teacher is not None:
        _check_distilled(network, diffusion, sampling, distillation)
    network.format.config_entries(network.config)
    return network


def write_pipeline(
    folder: Path,
    network: Network,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
    card: str | None = None,
    further: Further | None = None,
) -> None:
    """Write a model as a pipeline of diffusers; other files in the folder stay.

    A distilled U-Net is a `DDIMPipeline`, any other a `DDPMPipeline`. Where no pipeline of
    diffusers samples from such a network with such a scheduler, both are written without an index.
    A latent model with classes and a transformer is a `DiTPipeline`; one with a U-Net, and CLIP's
    text encoder as Stable Diffusion uses it, a `StableDiffusionPipeline`; any other has an index of
    a `DiffusionPipeline`, by which this engine reads it.

    Args:
        folder: created if missing.
        network: the network.
        diffusion: its process.
        sampling: how it is sampled.
        distillation: how it was distilled, if it was.
        card: text of its README.md.
        further: what a latent model has besides.

    Raises:
        UserError: as `check_pipeline`, or the folder holds parts of a model of another kind.
        OSError: the folder cannot be written.
    """
    stored = check_pipeline(network, diffusion, sampling, distillation)
    latent = further is not None
    process = scheduler.scheduler_entries(diffusion, sampling, distillation, latent)
    form, null_class = stored.format, stored.conditioning.null_class
    part = form.part
    _check_parts(folder, (part, *latent_parts.names(further)))
    files = form.writers(stored.config, stored.state_dict(), null_class)
    writers = {f"{part}/{name}": writer for name, writer in files.items()}
    writers[f"scheduler/{SCHEDULER_CONFIG}"] = json_writer(process)
    if card is not None:
        writers[CARD] = text_writer(card)
    entries = [f"{part}/{NETWORK_CONFIG}"]
    sampler = process["_class_name"]
    if further is not None:
        index = {
            "scheduler": ["diffusers", sampler],
            part: ["diffusers", form.class_name(stored.config)],
        }
        writers |= latent_parts.writers(folder, further)
        writers[INDEX] = json_writer({**latent_parts.index_entries(further, part), **index})
        entries.append(INDEX)
    elif (pipeline := form.pipelines_of(stored.config).get(sampler)) is not None:
        kind = form.class_name(stored.config)
        parts = {"scheduler": ["diffusers", sampler], part: ["diffusers", kind]}
        writers[INDEX] = json_writer({"_class_name": pipeline, **parts})
        entries.append(INDEX)
    write_together(folder, writers, entries, obsolete=[INDEX])


def _check_parts(folder: Path, written: tuple[str, ...]) -> None:
    """Refuse a folder in which something else would be read, or written, in place of the parts."""
    for name in (*written, "scheduler"):
        part = folder / name
        if part.is_symlink() or (part.exists() and not part.is_dir()):
            raise UserError(
                f"{part} is {'a link' if part.is_symlink() else 'a file'}, and a folder of that "
                "name is to be written; move it elsewhere, or choose another folder"
            )
    for name in (*PARTS, *map(averaged_part, PARTS)):
        if name not in written and (folder / name).exists():
            raise UserError(
                f"{folder / name} might be read in place of the new network; move it elsewhere, "
                "or choose another folder"
            )
    for name in written:
        check_no_other_weights(folder / name)


def _check_distilled(
    network: StoredNetwork,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig,
) -> None:
    """Refuse a distilled network whose steps no sampler of diffusers takes."""
    steps, timesteps = sampling.steps, diffusion.timesteps
    if distillation.method == "moments":
        reason = "of networks made by moment matching no export is written yet"
    elif (sampler := scheduler.scheduler_entries(diffusion, sampling)["_class_name"]) not in (
        scheduler.CLASS, scheduler.DDIM_CLASS,
    ):  # fmt: skip
        reason = f"{sampler} visits other noise levels"
    elif steps is None or timesteps % steps:
        reason = (
            f"DDIMScheduler takes strides of whole timesteps, and {steps} does not divide the "
            f"{timesteps} of the schedule"
        )
    elif network.config.out_channels != network.config.in_channels:
        reason = "DDIMPipeline does not know networks that predict a variance"
    else:
        return
    raise UserError(
        f"this network was distilled to {steps} steps of {sampling.sampler} that no sampler "
        f"of diffusers takes: {reason}. Sample from it with this engine, or export its teacher, "
        f"{distillation.teacher}"
    )
