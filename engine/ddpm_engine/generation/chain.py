"""Chains of trained models: a cascade of image sizes, a prior and its decoder, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.checkpoints.load import LoadedModel, load
from ddpm_engine.data.classes import match_classes
from ddpm_engine.errors import UserError
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.samplers.samples import Chosen, Samples, chosen_of, samples_of
from ddpm_engine.samplers.stages import ChainSampler, Stage, stage_seed
from ddpm_engine.sizes import as_text, height_and_width, size_of

_OF_ONE_MODEL = (
    "conditions", "embeddings", "images", "interpolate", "low_resolution", "mask", "repeats",
    "strength",
)  # fmt: skip
"""Fields of a request that a chain has no place for."""


class Cascade:
    """Models, each of which takes what the one before has sampled.

    The first generates images, or image embeddings (a prior); each of the others is conditioned on
    them: a super-resolution model on low-resolution images, a decoder on embeddings. All that are
    conditioned on text get the prompts.

    Args:
        models: at least two, in their order; a path or a name is loaded as `load` does.
        device: of those that are loaded; None: a GPU if there is one.

    Raises:
        UserError: models that do not fit each other, or that cannot be loaded.
    """

    def __init__(
        self,
        models: Sequence[DiffusionModel | Path | str],
        device: torch.device | str | None = None,
    ) -> None:
        if len(models) < 2:
            raise UserError(
                f"`cascade` names {len(models)} model(s); give a base model and those that follow",
                "cascade",
            )
        self.models = tuple(
            model if isinstance(model, DiffusionModel) else load(model, device) for model in models
        )
        for number in range(1, len(models)):
            _check_follows(number, self.models[number - 1], self.models[number])

    def sample(
        self,
        ids: Chosen,
        *,
        batch_size: int = 64,
        progress: bool | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> Samples:
        """Sample from all models in turn; arguments as in `samplers.samples.sample`.

        Args:
            ids: of the samples, or N, or prompts.
            batch_size: number of samples at a time.
            progress: whether to print a progress bar.
            stages: see `sampler`.
            options: see `sampler`.

        Raises:
            UserError: a request that one of the models cannot serve.
        """
        chosen, options = chosen_of(ids, options)
        return samples_of(self.sampler(stages, **options), chosen, batch_size, progress)

    def sampler(self, stages: Sequence[Mapping[str, Any]] = (), **options: Any) -> ChainSampler:
        """Bind a request to the models.

        Args:
            stages: options of the first, second, … model that replace those of all.
            options: fields of `SampleRequest` and of `SamplingConfig`, for all models that have a
                use for them: `augmentation_level` for those that upscale, `prompts`, `classes` and
                `guidance` for those with such conditions.

        Raises:
            UserError: a request that one of the models cannot serve, or options of more models than
                there are.
        """
        if len(stages) > len(self.models):
            raise UserError(
                f"`stages` has {len(stages)} entries for {len(self.models)} models; give at most "
                "one for each",
                "stages",
            )
        options = {name: value for name, value in options.items() if _is_given(name, value)}
        for name in _OF_ONE_MODEL:
            if name in options:
                raise UserError(
                    f"`{name}` does nothing in a cascade; leave it out, or sample from one model "
                    "after the other",
                    name,
                )
        seed = options.pop("seed", 0)
        self._check_used(options)
        bound: list[Stage] = []
        for number, model in enumerate(self.models):
            own = stages[number] if number < len(stages) else {}
            given = {**_useful(model, options), **own, "seed": stage_seed(seed, number)}
            if bound:
                before = bound[-1]
                given["embeddings" if before.embeddings else "low_resolution"] = before
            request = model.request(**given)
            if number == len(self.models) - 1:
                return ChainSampler(model, request, bound, seed)
            bound.append(_stage(model, request, self.models[number + 1]))
        raise AssertionError("there are models")

    def _check_used(self, options: Mapping[str, Any]) -> None:
        """Refuse what no model has a use for, as a single model does."""
        for name in ("prompts", "classes", "guidance", "augmentation_level", "threshold"):
            if name in options and not any(name in _useful(m, options) for m in self.models):
                raise UserError(
                    f"`{name}` is given, but no model of the cascade has a use for it; leave it "
                    "out",
                    name,
                )


def _is_given(name: str, value: Any) -> bool:
    """Whether a field of a request has another value than its default."""
    field = SampleRequest.__dataclass_fields__.get(name)
    return value is not None and (field is None or value is not field.default)


def _check_follows(number: int, before: DiffusionModel, model: DiffusionModel) -> None:
    """Refuse a model that does not take what the one before samples."""
    upscales = model.spec.low_resolution is not None
    channels, height, width = before.image_shape if upscales else before.shape
    made = f"model {number} samples {as_text(size_of(height, width))} with {channels} channels"
    if model.spec.low_resolution is not None:
        wanted = (model.shape[0], *height_and_width(model.spec.low_resolution))
        if wanted != (channels, height, width):
            raise UserError(
                f"`cascade`: {made}, and model {number + 1} upscales "
                f"{as_text(model.spec.low_resolution)} with {model.shape[0]}; give models that "
                "follow each other",
                "cascade",
            )
        return
    if model.spec.vector is None or model.vector != "image":
        raise UserError(
            f"`cascade`: model {number + 1} is conditioned neither on low-resolution images nor on "
            "image embeddings; give models that follow each other",
            "cascade",
        )
    if before.shape != (model.spec.vector, 1, 1):
        raise UserError(
            f"`cascade`: {made}, and model {number + 1} is conditioned on embeddings of "
            f"{model.spec.vector} channels; give it a prior that samples these",
            "cascade",
        )
    spaces = [_embeddings_of(one) for one in (before, model)]
    if None not in spaces and spaces[0] != spaces[1]:
        raise UserError(
            f"`cascade`: model {number} samples the embeddings {spaces[0]}, and model {number + 1} "
            f"was trained on {spaces[1]}; give models of the same embeddings",
            "cascade",
        )


def _embeddings_of(model: DiffusionModel) -> str | None:
    """Name and fingerprint of the image embeddings that a model was trained on, if recorded."""
    if not isinstance(model, LoadedModel) or model.checkpoint is None:
        return None
    record = model.checkpoint.state.get("image_embeddings")
    if not isinstance(record, Mapping):
        return None
    return f"{record.get('name')} ({str(record.get('fingerprint'))[:12]})"


def _useful(model: DiffusionModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a model of a chain has a use for."""
    spec = model.spec
    prompts = model.takes_text and options.get("prompts") is not None
    classes = spec.null_class is not None and options.get("classes") != "none"
    image = spec.vector is not None and model.vector == "image"
    guided = prompts or classes or image
    unused = set()
    if not prompts:
        unused |= {"prompts", "negative_prompt"}
    if spec.null_class is None:
        unused |= {"classes"}
    if not guided or options.get("guidance") is None:
        unused |= {"guidance", "negative_prompt"}
    if spec.low_resolution is None:
        unused |= {"augmentation_level"}
    if model.shape[1:] == (1, 1) or model.codec.clip_range is None:
        unused |= {"threshold"}  # embeddings and latents have no bounds
    return {name: value for name, value in options.items() if name not in unused}


def _stage(model: DiffusionModel, request: SampleRequest, following: DiffusionModel) -> Stage:
    """Bind a model whose samples another takes."""
    sampler = Sampler(model, request)
    identity: dict[str, Any] = {}
    if isinstance(model, LoadedModel):
        identity = {"checkpoint": model.hash, "weights": model.weights}
    return Stage(
        sampler,
        identity,
        embeddings=following.spec.low_resolution is None,
        classes=_renumbered(sampler.classes, model, following),
    )


def _renumbered(
    classes: tuple[int, ...] | None, model: DiffusionModel, following: DiffusionModel
) -> tuple[int, ...] | None:
    """Classes of a model's samples, numbered as the next one numbers its own."""
    null = following.spec.null_class
    names, known = (getattr(one, "classes", None) for one in (model, following))
    if classes is None or null is None:
        return None
    if names is None:
        return classes
    numbers = match_classes(known, null, names, "the model before")
    return tuple(numbers[label] if label < len(numbers) else null for label in classes)
