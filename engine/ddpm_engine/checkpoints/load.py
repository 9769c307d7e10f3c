"""Load a checkpoint, or another library's model, ready to sample."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.checkpoints.parts import check_finite, load_part
from ddpm_engine.checkpoints.store import MANIFEST, Checkpoint, CheckpointStore, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.data.classes import ClassNames, class_names_in
from ddpm_engine.errors import UserError
from ddpm_engine.interop.pipeline import check_pipeline, write_pipeline
from ddpm_engine.interop.scheduler import read_scheduler
from ddpm_engine.locations import user_path
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.files.entries import listing
from ddpm_engine.networks.files.hub import local_folder
from ddpm_engine.networks.files.layout import (
    NETWORK_CONFIG,
    Layout,
    find_layout,
    has_average_apart,
    is_diffusers,
)
from ddpm_engine.networks.unet.files import read_config, read_unet
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.printable import check_utf8
from ddpm_engine.runtime import local_device
from ddpm_engine.samplers.identity import Ids
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.samples import Samples, sample


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedModel(DiffusionModel):
    """A trained model: it samples, and says where it comes from."""

    config: RunConfig
    """Configuration of the run that trained it; for another library's model what its files say,
    else defaults."""
    hash: str
    """Identifies it: the checkpoint's hash, or the sha256 of another library's weight file."""
    checkpoint: Checkpoint | None = None
    """What was loaded; None for another library's model."""
    weights: str | None = None
    """Which of a run's weights these are, such as `ema`; None for another library's model."""

    @classmethod
    def from_config(
        cls,
        network: Network,
        config: RunConfig,
        hash: str,
        *,
        checkpoint: Checkpoint | None = None,
        weights: str | None = None,
    ) -> LoadedModel:
        """Bind a network to the process that a run's configuration describes.

        Args:
            network: trained, in eval mode.
            config: of the run.
            hash: identifies the weights.
            checkpoint: where they come from, if from a run.
            weights: which of the run's.
        """
        return cls(
            network,
            config.diffusion.build_schedule(),
            config.diffusion.prediction,
            config.sampling,
            config=config,
            hash=hash,
            checkpoint=checkpoint,
            weights=weights,
        )

    @property
    def step(self) -> int | None:
        """Optimizer steps it was trained for; None if unknown."""
        return None if self.checkpoint is None else self.checkpoint.step

    @property
    def classes(self) -> ClassNames | None:
        """Names of the classes 0, 1, ... that it was trained on, as far as they were recorded."""
        if self.checkpoint is None or self.spec.null_class is None:
            return None
        return class_names_in(self.checkpoint.state.get("classes"))

    def sample(
        self,
        ids: int | Ids,
        *,
        batch_size: int = 64,
        progress: bool | None = None,
        **options: Any,
    ) -> Samples:
        """Sample; arguments as in `samplers.samples.sample`."""
        return sample(self, ids, batch_size=batch_size, progress=progress, **options)

    def resolve(self, request: SampleRequest) -> SampleRequest:
        """Fill in whatever a request leaves to the model.

        Raises:
            UserError: a request that the model cannot serve, such as other steps than those that a
                distilled network has learned.
        """
        resolved = super().resolve(request)
        if self.config.distillation.teacher is not None:
            self._check_distilled(resolved)
        return resolved

    def check_export(self) -> None:
        """Check that `save_pretrained` can write the model.

        Raises:
            UserError: diffusers has no such network or no sampler for it.
        """
        config = self.config
        check_pipeline(config.model, config.diffusion, config.sampling, config.distillation)

    def save_pretrained(self, path: Path | str, card: str | None = None) -> None:
        """Save as a pipeline of diffusers: `load` and `DDPMPipeline.from_pretrained` read it.

        Files of an earlier save are replaced, all of them or none; others stay.

        Args:
            path: of the folder, created if missing.
            card: text of a README.md.

        Raises:
            UserError: as `check_export`, or the folder holds parts of a model of another kind.
            OSError: the folder cannot be written.
        """
        config = self.config
        write_pipeline(
            user_path(path), self.network, config.diffusion, config.sampling, config.distillation,
            card,
        )  # fmt: skip

    def _check_distilled(self, request: SampleRequest) -> None:
        known, asked = self.sampling, request.sampling or self.sampling
        fields = {
            "sampler": (asked.sampler, known.sampler),
            "timesteps": (request.timesteps, None),
            "steps": (asked.steps, None if request.timesteps else known.steps),
            "spacing": (asked.spacing, known.spacing),
            "eta": (asked.eta, known.eta),
            "variance": (asked.variance, known.variance),
            "cache_interval": (request.cache_interval, 1),
        }
        for field, (given, learned) in fields.items():
            if given != learned:
                raise UserError(
                    f"`{field}` is {given}, but this network was distilled: it has learned the "
                    f"{known.steps} steps of {known.sampler} with {known.spacing} spacing, each "
                    f"in one evaluation, and no others; leave `{field}` out"
                )
        if request.guidance is not None:
            scale = self.config.distillation.guidance_scale
            built_in = "none" if scale is None else f"a scale of {scale:g}"
            raise UserError(
                f"`guidance.scale` is {request.guidance.scale:g}, but this network was distilled "
                f"with {built_in} built in; leave it out, or distill the teacher with another "
                "`distillation.guidance_scale`"
            )


def load(
    path: Path | str, device: torch.device | str | None = None, weights: str = "ema"
) -> LoadedModel:
    """Load a trained model, on a GPU if there is one; arguments as in `load_model`."""
    return load_model(path, local_device() if device is None else device, weights)


def load_model(
    path: Path | str, device: torch.device | str = "cpu", weights: str = "ema"
) -> LoadedModel:
    """Load a run's newest sound checkpoint, or one checkpoint, or a model that diffusers saved.

    Args:
        path: a run directory, or one `checkpoints/step-…` in it, or the folder of a pipeline of
            diffusers, or the name of one on the Hugging Face hub, such as
            `google/ddpm-cifar10-32`.
        device: where the network goes.
        weights: `"ema"`, or `"model"` for the weights without averaging, of a run or of a training
            checkpoint of diffusers; its finished models have one network.

    Raises:
        NotFiniteError: the weights hold NaN or infinity.
        UserError: no checkpoint there, a damaged one, or one of another architecture.
    """
    path = local_folder(path)
    check_utf8(path)
    foreign = not _is_run(path) and is_diffusers(path)
    if foreign and weights != "ema" and not has_average_apart(path):
        raise UserError(
            f"`weights` is {weights}, which chooses among those of a run, but {path} is a model "
            "of diffusers that has one set; leave it out",
            "weights",
        )
    loaded = _load_diffusers(path, weights) if foreign else _load_run(path, weights)
    loaded.network.to(device).eval().requires_grad_(False)
    return loaded


def config_of(path: Path | str) -> RunConfig:
    """Read the configuration that a model was trained with, without its weights.

    Args:
        path: as in `load_model`.

    Raises:
        UserError: no checkpoint there, or one whose configuration cannot be read.
    """
    path = local_folder(path)
    if not _is_run(path) and is_diffusers(path):
        return _diffusers_config(find_layout(path))
    return _find_checkpoint(path, parts=()).config


def _is_run(path: Path) -> bool:
    """A run is known by its checkpoints, so that nothing else in its directory need be sound."""
    return (path / MANIFEST).exists() or (path / "checkpoints").exists()


def _find_checkpoint(path: Path, parts: Collection[str]) -> Checkpoint:
    """The checkpoint in a folder, or the newest of a run whose `parts` are sound."""
    if (path / MANIFEST).exists():
        checkpoint, rejected = verify(path, parts)
    else:
        checkpoint, rejected = CheckpointStore(path / "checkpoints").newest(parts)
    if checkpoint is None:
        reasons = "".join(f"\n       {reason}" for reason in rejected)
        then = "\n       " if reasons else "; "
        held = ":" if reasons else f", which holds {listing(path)}" if path.is_dir() else ""
        raise UserError(
            f"there is no usable checkpoint in {path}{held}{reasons}{then}"
            "give a run directory, one of its checkpoints/step-…, the folder of a diffusers "
            "model, or the name of one on the Hugging Face hub"
        )
    return checkpoint


def _load_run(path: Path, weights: str) -> LoadedModel:
    checkpoint = _find_checkpoint(path, (weights,))
    config = checkpoint.config
    network = build_network(config.model, initialised=False)
    load_part(checkpoint.path, weights, network.state_dict())
    check_finite(str(checkpoint.path / weights), network.state_dict())
    plan = config.distillation
    if plan.teacher is not None:
        # Of an unfinished distillation, the student has not learned such long steps yet.
        stage = plan.stage(max(checkpoint.step - 1, 0), config.training.steps)
        sampling = replace(config.sampling, steps=plan.student_steps(stage))
        config = replace(config, sampling=sampling)
    return LoadedModel.from_config(
        network, config, checkpoint.hash, checkpoint=checkpoint, weights=weights
    )


def _load_diffusers(path: Path, weights: str) -> LoadedModel:
    averaged = weights == "ema"
    layout = find_layout(path, averaged)
    before = _identity_of(layout)
    config = _diffusers_config(layout)
    stored = read_unet(layout.network, averaged)
    if _identity_of(layout) != before:
        raise UserError(f"{path} changed while it was read; load it again")
    network = UNet.from_stored(stored, layout.network)
    if network.conditioning.null_class != stored.null_class:
        raise UserError(
            f"num_class_embeds is {config.model.num_class_embeds} in "
            f"{layout.network / NETWORK_CONFIG}, and nothing says that the last of these classes "
            "stands for no class, as it does in this engine: load the network with "
            "UNet.from_pretrained and give labels yourself"
        )
    check_finite(str(layout.network), network.state_dict())
    return LoadedModel.from_config(network, config, stored.hash)


def _identity_of(layout: Layout) -> tuple[int, int] | None:
    """What changes whenever another model is saved in a folder."""
    try:
        status = (layout.network / NETWORK_CONFIG).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _diffusers_config(layout: Layout) -> RunConfig:
    """The configuration of a run that would have trained a model of diffusers."""
    if not layout.scheduler.exists():
        raise UserError(
            f"{layout.scheduler} is missing; download or save the whole model again, or copy it "
            f"from where its training saved the whole pipeline ({layout.network.parent} holds "
            f"{listing(layout.network.parent)})"
        )
    process = read_scheduler(layout.scheduler)
    shape = read_config(layout.network / NETWORK_CONFIG)
    outputs = shape.in_channels * (2 if process.sampling.variance.startswith("learned") else 1)
    if shape.out_channels != outputs:
        raise UserError(
            f"out_channels is {shape.out_channels} in {layout.network / NETWORK_CONFIG}: with "
            f"in_channels {shape.in_channels} and the variance {process.sampling.variance} of "
            f"{layout.scheduler} it must be {outputs}; one of the two files is of another model"
        )
    return RunConfig(
        model=shape,
        diffusion=process.diffusion,
        sampling=process.sampling,
        distillation=process.distillation,
    )
