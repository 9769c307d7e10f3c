"""Load a checkpoint, or another library's model, ready to sample."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.checkpoints.lazy_codec import LazyCodec, recorded_codec
from ddpm_engine.checkpoints.lazy_text_encoder import LazyTextEncoder, recorded_text_encoder
from ddpm_engine.checkpoints.parts import check_finite, load_part
from ddpm_engine.checkpoints.recorded_config import located_beside
from ddpm_engine.checkpoints.store import MANIFEST, Checkpoint, CheckpointStore, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.data.classes import ClassNames, class_names_in
from ddpm_engine.errors import UserError
from ddpm_engine.interop.latent_parts import Further
from ddpm_engine.interop.pipeline import check_pipeline, write_pipeline
from ddpm_engine.interop.published import STEPS, read_published
from ddpm_engine.interop.scheduler import read_scheduler
from ddpm_engine.locations import user_path
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.files.entries import listing
from ddpm_engine.networks.files.hub import local_folder
from ddpm_engine.networks.files.layout import (
    AUTOENCODER,
    NETWORK_CONFIG,
    Layout,
    find_layout,
    has_average_apart,
    is_diffusers,
)
from ddpm_engine.networks.registry import stored_class
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.printable import check_utf8
from ddpm_engine.runtime import local_device
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.samples import Chosen, Samples, sample

logger = logging.getLogger(__name__)


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
    text_encoder: LazyTextEncoder | None = None
    """The text encoder it was trained with, opened when it is first used; None: it takes no text,
    or nothing says which."""
    labels: ClassNames | None = None
    """Names of the classes that another library's model lists."""

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
            vector=config.data.vector,
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
            return self.labels
        return class_names_in(self.checkpoint.state.get("classes"))

    def sample(
        self,
        ids: Chosen,
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
        check_pipeline(self.network, config.diffusion, config.sampling, config.distillation)

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
            card, self._further(),
        )  # fmt: skip

    def _further(self) -> Further | None:
        """What an export has besides, of a latent model; both encoders are opened and compared."""
        if not isinstance(self.codec, LazyCodec):
            return None
        codec, encoder = self.codec.open(), self.text_encoder
        return Further(
            self.codec.place,
            codec.scale,
            codec.shift,
            None if encoder is None else encoder.open().place,
            encoder is not None and encoder.open().padded,
            self.classes,
        )

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
    path: Path | str,
    device: torch.device | str | None = None,
    weights: str = "ema",
    text_encoder: str | None = None,
    autoencoder: str | None = None,
) -> LoadedModel:
    """Load a trained model, on a GPU if there is one; arguments as in `load_model`."""
    device = local_device() if device is None else device
    return load_model(path, device, weights, text_encoder, autoencoder)


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    weights: str = "ema",
    text_encoder: str | None = None,
    autoencoder: str | None = None,
) -> LoadedModel:
    """Load a run's newest sound checkpoint, or one checkpoint, or a model that diffusers saved.

    Args:
        path: a run directory, or one `checkpoints/step-…` in it, or the folder of a pipeline of
            diffusers, or the name of one on the Hugging Face hub, such as
            `google/ddpm-cifar10-32`.
        device: where the network goes.
        weights: `"ema"`, or `"model"` for the weights without averaging, of a run or of a training
            checkpoint of diffusers; its finished models have one network.
        text_encoder: place of the text encoder, as `open_text_encoder` takes it, if it is not where
            it was in training. It is opened when it is first used, and then has to be the same.
        autoencoder: place of the autoencoder whose latents the network samples, as
            `open_autoencoder` takes it; likewise.

    Raises:
        NotFiniteError: the weights hold NaN or infinity.
        UserError: no checkpoint there, a damaged one, or one of another architecture, or a text
            encoder for a network that takes no text, or an autoencoder for one that samples pixels.
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
    loaded = _load_diffusers(path, weights, device) if foreign else _load_run(path, weights)
    loaded.network.to(device).eval().requires_grad_(False)
    loaded = with_codec(loaded, path, device, autoencoder)
    return with_text_encoder(loaded, path, device, text_encoder)


def with_codec(
    loaded: LoadedModel, path: Path, device: torch.device | str, place: str | None
) -> LoadedModel:
    """Bind the autoencoder of a network that samples latents, which is not opened yet.

    Args:
        loaded: the model.
        path: where it was loaded from.
        device: where the autoencoder computes.
        place: as `autoencoder` of `load_model`.

    Raises:
        UserError: a damaged record of the autoencoder, or a place for a network that samples
            pixels.
    """
    checkpoint, channels = loaded.checkpoint, loaded.shape[0]
    if checkpoint is None:
        layout = find_layout(path)
        if place is None and not layout.autoencoder:
            return loaded
        beside = str(layout.network.parent / AUTOENCODER)
        codec = LazyCodec(place or beside, channels=channels, device=device)
    else:
        record = checkpoint.state.get("autoencoder")
        if record is None and place is not None:
            raise UserError(
                f"`autoencoder` is {place}, but the network of {path} was not trained on latents; "
                "leave it out",
                "autoencoder",
            )
        if record is None:
            return loaded
        codec = recorded_codec(record, channels, device, place)
        if place is None:
            run = checkpoint.path.parent.parent
            codec.place = located_beside(checkpoint.state["config"], run, codec.place)
    # Whether estimates of x_0 are clipped depends on what they are of.
    return replace(loaded, codec=codec, sampling=loaded.config.sampling)


def with_text_encoder(
    loaded: LoadedModel, path: Path, device: torch.device | str, place: str | None
) -> LoadedModel:
    """Bind the text encoder of a network that takes text, which is not opened yet.

    Args:
        loaded: the model.
        path: where it was loaded from.
        device: where the encoder computes.
        place: as `text_encoder` of `load_model`.

    Raises:
        UserError: a damaged record of the encoder, or a place for a network that takes no text.
    """
    spec, checkpoint = loaded.spec, loaded.checkpoint
    if checkpoint is None and place is None and loaded.text_encoder is not None:
        return loaded
    if not loaded.takes_text:
        if place is not None:
            raise UserError(
                f"`text_encoder` is {place}, but the network of {path} is not conditioned on "
                "text; leave it out",
                "text_encoder",
            )
        return loaded
    record = None if checkpoint is None else checkpoint.state.get("text_encoder")
    encoder = recorded_text_encoder(record, spec.text, device, place)
    if encoder is not None and checkpoint is not None and place is None:
        run = checkpoint.path.parent.parent
        encoder.place = located_beside(checkpoint.state["config"], run, encoder.place)
    null = record.get("null_prompt") if isinstance(record, Mapping) else None
    return replace(
        loaded,
        text_encoder=encoder,
        null_prompt=null if isinstance(null, str) else loaded.null_prompt,
    )


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
    if isinstance(config.model, AutoencoderKLConfig):
        raise UserError(
            f"{path} is the run of an autoencoder, which samples nothing; train a model of its "
            f"latents, with the folder {AUTOENCODER} that it leaves when it is finished"
        )
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


def _load_diffusers(path: Path, weights: str, device: torch.device | str) -> LoadedModel:
    averaged = weights == "ema"
    layout = find_layout(path, averaged)
    before = _identity_of(layout)
    config = _diffusers_config(layout)
    kind = stored_class(layout.network / NETWORK_CONFIG)
    stored = kind.format.read(layout.network, averaged)
    if _identity_of(layout) != before:
        raise UserError(f"{path} changed while it was read; load it again")
    network = kind.from_stored(stored, layout.network)
    if network.conditioning.null_class != stored.null_class:
        raise UserError(
            f"num_class_embeds is {config.model.num_class_embeds} in "
            f"{layout.network / NETWORK_CONFIG}, and nothing says that the last of these classes "
            "stands for no class, as it does in this engine: load the network with "
            f"{kind.__name__}.from_pretrained and give labels yourself"
        )
    check_finite(str(layout.network), network.state_dict())
    published = read_published(layout)
    encoder = None
    if layout.text_encoder is not None and network.conditioning.text is not None:
        place, channels = str(layout.text_encoder), network.conditioning.text
        encoder = LazyTextEncoder(place, channels=channels, device=device)
    return replace(
        LoadedModel.from_config(network, config, stored.hash),
        text_encoder=encoder,
        null_prompt=published.null_prompt,
        labels=published.classes,
    )


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
    file = layout.network / NETWORK_CONFIG
    shape = stored_class(file).format.read_config(file)
    sampling = process.sampling
    if sampling.sampler != "ddpm" and shape.out_channels == 2 * shape.in_channels:
        # Such a configuration says nothing of variances; the network's outputs do.
        sampling = replace(sampling, variance="learned_range")
    if sampling.steps is None and (layout.autoencoder is not None or sampling.steps_offset):
        # As pipelines have it; with an offset, all timesteps cannot be visited.
        sampling = replace(sampling, steps=STEPS)
    learned = sampling.variance.startswith("learned")
    outputs = shape.in_channels * (2 if learned else 1)
    if shape.out_channels != outputs:
        raise UserError(
            f"out_channels is {shape.out_channels} in {file}: with "
            f"in_channels {shape.in_channels} and the variance {sampling.variance} of "
            f"{layout.scheduler} it must be {outputs}; one of the two files is of another model"
        )
    return RunConfig(
        model=shape,
        diffusion=process.diffusion,
        objective=ObjectiveConfig(learned_variance=learned),
        sampling=sampling,
        distillation=process.distillation,
    )
