"""What picture k of a seed is: a function of k, so that anybody can draw it, in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.generation.input_images import InputImages, SamplesAsInput
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.runtime import check_precision
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.inpainting import Inpainting
from ddpm_engine.samplers.sampler import Chain, interpolated_noise

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything besides the network that determines the pictures."""

    seed: int = 0
    """Of all noise."""
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009
    """Which sampler, and its steps."""
    timesteps: tuple[int, ...] | None = None
    """Visit these instead of so many steps."""
    classes: tuple[int, ...] | None = None
    """Picture k is of entry k, and again from the first after the last; None: of no class."""
    guidance: Guidance | None = None
    """How far to go beyond the conditional prediction."""
    threshold: float | None = None
    """Quantile of dynamic thresholding."""
    images: InputImages | None = None
    """What the pictures begin with (if there is a strength) or keep (if there is a mask)."""
    strength: float | None = None
    """Share of the steps that is taken from the images; None: begin with noise."""
    mask: Tensor | None = None
    """bool `[1, 1, H, W]`: True where the images are kept."""
    draws: int = 1
    """How often inpainting takes each step."""
    low_resolution: SamplesAsInput | InputImages | None = None
    """The small image that each picture is made from, by a network that enlarges."""
    augmentation: int = 0
    """Steps of noise that the small images are given."""
    interpolate: tuple[int, int, int] | None = None
    """First id, second id, count N: pictures 0 … N − 1 lead from the one to the other."""
    cache_interval: int = 1
    """Recompute the network's deep levels at every so many-th step only."""
    precision: Precision = "no"
    """Of the network's arithmetic; no: float32."""

    def settings(self) -> dict[str, Any]:
        """What a manifest says of it, as JSON values.

        What changes pictures by no more than the rounding of the network's arithmetic is left out.
        """
        guidance = self.guidance
        low, high = (None, None) if guidance is None else guidance.interval
        return {
            "seed": self.seed,
            **self.sampling.table_options(),
            "timesteps": self.timesteps,
            "classes": self.classes,
            "guidance_scale": None if guidance is None else guidance.scale,
            "guidance_rescale": None if guidance is None else guidance.rescale,
            "guidance_interval": [low, None if high == float("inf") else high],
            "threshold": self.threshold,
            "images": None if self.images is None else self.images.sha256,
            "strength": self.strength,
            "mask": None if self.mask is None else _sha256(self.mask),
            "draws": self.draws,
            "low_resolution": None if self.low_resolution is None else self.low_resolution.sha256,
            "augmentation": None if self.low_resolution is None else self.augmentation,
            "interpolate": self.interpolate,
            "cache_interval": self.cache_interval,
            "precision": self.precision,
        }


class Drawing:
    """A recipe and the network that carries it out.

    Args:
        pretrained: the network, on its device.
        recipe: what to draw.
        on_step: called with the number of pictures that each step advances.

    Raises:
        UserError: a recipe that this network or this machine cannot carry out.
    """

    def __init__(
        self,
        pretrained: LoadedModel,
        recipe: Recipe,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.pretrained = pretrained
        model, config = pretrained.model, pretrained.config
        self.model = model
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            check_precision(recipe.precision, "--precision")
        sampling = recipe.sampling
        if sampling.steps is None and recipe.timesteps is None:
            sampling = replace(sampling, steps=config.diffusion.timesteps)
        self.recipe = recipe = replace(recipe, sampling=sampling)
        self._check_classes()
        self._check_low_resolution()
        self._check_distilled()
        self.chain = Chain(
            model,
            pretrained.schedule,
            seed=recipe.seed,
            **sampling.table_options(),
            timesteps=recipe.timesteps,
            prediction=config.diffusion.prediction,
            augmentation=recipe.augmentation,
            guidance=recipe.guidance,
            clip=pretrained.clip,
            threshold=recipe.threshold,
            strength=recipe.strength,
            draws=recipe.draws,
            cache_interval=recipe.cache_interval,
        )
        self._states = self._interpolated()
        self._on_step = on_step

    @property
    def evaluations(self) -> int:
        """Steps of the loop a picture."""
        return self.chain.table.evaluations

    def settings(self) -> dict[str, Any]:
        """The recipe's, and which network."""
        return {
            **self.recipe.settings(),
            "checkpoint": self.pretrained.hash,
            "checkpoint_step": self.pretrained.step,
        }

    def label_of(self, sample_id: int) -> int | None:
        """The class of a picture, if it has one."""
        classes = self.recipe.classes
        label = None if classes is None else classes[sample_id % len(classes)]
        return None if label == self.model.conditioning.null_class else label

    def draw(self, ids: Sequence[int]) -> np.ndarray:
        """Draw pictures, in one batch: uint8 `[N, H, W, C]`.

        Raises:
            UserError: an image that cannot be read.
        """
        recipe = self.recipe
        images = None if recipe.images is None else recipe.images.of(ids)
        small = None if recipe.low_resolution is None else recipe.low_resolution.of(ids)
        inpainting = None
        if recipe.mask is not None and images is not None:
            inpainting = Inpainting(images, recipe.mask, recipe.draws)
        with self._autocast():
            drawn = self.chain.draw(
                torch.tensor(list(ids), dtype=torch.int64, device=self.device),
                labels=self._labels(ids),
                low_resolution=small,
                initial=None if self._states is None else self._states[list(ids)],
                images=None if recipe.strength is None else images,
                inpainting=inpainting,
                on_step=self._on_step,
            )
        return PixelCodec().decode(drawn)

    def warm_up(self, batch: int) -> None:
        """Compile whatever a batch of so many pictures needs."""
        with self._autocast():
            self.chain.warm_up(
                batch, self.device, labelled=self.model.conditioning.null_class is not None
            )

    def _labels(self, ids: Sequence[int]) -> Tensor | None:
        null = self.model.conditioning.null_class
        if null is None:
            return None
        labels = [null if (label := self.label_of(k)) is None else label for k in ids]
        return torch.tensor(labels, device=self.device)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.recipe.precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def _check_classes(self) -> None:
        null, classes = self.model.conditioning.null_class, self.recipe.classes
        if classes is None:
            if self.recipe.guidance is not None:
                why = "the pictures are of no class; give --class-label or --class-labels"
                if null is None:
                    why = "this network was trained without classes; leave it out"
                raise UserError(f"--guidance-scale leads towards a class, but {why}")
            return
        if null is None:
            raise UserError(
                f"--class-label is {classes[0]} but this network was trained without classes; "
                "leave it out"
            )
        if wrong := [label for label in classes if not 0 <= label <= null]:
            raise UserError(f"--class-label is {wrong[0]}; classes are 0 to {null - 1}")

    def _check_low_resolution(self) -> None:
        side = self.model.conditioning.low_resolution
        if side is not None and self.recipe.low_resolution is None:
            raise UserError(
                f"this network enlarges pictures of {side}×{side}; give some by --low-resolution, "
                "such as a folder that launch/sample.py drew from another model"
            )
        if side is None and self.recipe.low_resolution is not None:
            raise UserError(
                "--low-resolution is given, but this network enlarges nothing; leave it out"
            )

    def _check_distilled(self) -> None:
        config, recipe = self.pretrained.config, self.recipe
        if config.distillation.teacher is None:
            return
        asked, known = recipe.sampling, config.sampling
        flags = {
            "sampler": (asked.sampler, known.sampler),
            "timesteps": (recipe.timesteps, None),
            "steps": (asked.steps, None if recipe.timesteps else known.steps),
            "spacing": (asked.spacing, known.spacing),
            "eta": (asked.eta, known.eta),
            "variance": (asked.variance, known.variance),
            "cache-interval": (recipe.cache_interval, 1),
        }
        for flag, (given, learnt) in flags.items():
            if given != learnt:
                raise UserError(
                    f"--{flag} is {given}, but this network was distilled: it has learnt the "
                    f"{known.steps} steps of {known.sampler} with {known.spacing} spacing, each "
                    f"in one evaluation, and no others; leave --{flag} out"
                )
        if recipe.guidance is not None:
            scale = config.distillation.guidance_scale
            built_in = "none" if scale is None else f"a scale of {scale:g}"
            raise UserError(
                f"--guidance-scale is {recipe.guidance.scale:g}, but this network was distilled "
                f"with {built_in} built in; leave it out, or distil the teacher with another by "
                "launch/distill.py --guidance-scale"
            )

    def _interpolated(self) -> Tensor | None:
        if self.recipe.interpolate is None:
            return None
        first, second, count = self.recipe.interpolate
        if count < 2 or first == second:
            raise UserError(
                f"{count} pictures are to lead from {first} to {second}; give two different ids "
                "and at least 2 pictures"
            )
        if self.chain.stochastic:
            raise UserError(
                f"to interpolate, the sampler must add no noise, and {self.recipe.sampling.sampler}"
                " does; use ddim, dpm++2m or unipc"
            )
        weights = torch.linspace(0, 1, count, dtype=torch.float64)
        return interpolated_noise(self.recipe.seed, first, second, weights, self.chain.shape)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
