"""What picture k of a seed is: a function of k, so that anybody can draw it, in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.generation.input_images import InputImages, SamplesAsInput
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.request import Precision, SampleRequest
from ddpm_engine.samplers.sampler import Sampler


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
    """A recipe bound to a model: until its callers use `Sampler` itself."""

    def __init__(
        self,
        pretrained: LoadedModel,
        recipe: Recipe,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.pretrained, self.model, self.device = pretrained, pretrained.network, pretrained.device
        request = SampleRequest(
            seed=recipe.seed,
            sampling=recipe.sampling,
            timesteps=recipe.timesteps,
            classes="none" if recipe.classes is None else recipe.classes,
            guidance=recipe.guidance,
            threshold=recipe.threshold,
            images=recipe.images,
            strength=recipe.strength,
            mask=recipe.mask,
            repeats=recipe.draws,
            low_resolution=recipe.low_resolution,
            augmentation_level=recipe.augmentation,
            interpolate=recipe.interpolate,
            cache_interval=recipe.cache_interval,
            precision=recipe.precision,
        )
        self.sampler = Sampler(pretrained, request)
        self.recipe = replace(recipe, sampling=self.sampler.sampling)
        self._on_step = on_step

    @property
    def evaluations(self) -> int:
        """Network evaluations per sample."""
        return self.sampler.evaluations

    def settings(self) -> dict[str, Any]:
        """The recipe's, and which network."""
        return {
            **self.recipe.settings(),
            "checkpoint": self.pretrained.hash,
            "checkpoint_step": self.pretrained.step,
        }

    def label_of(self, sample_id: int) -> int | None:
        """The class of a sample, if it has one."""
        return self.sampler.label_of(sample_id)

    def draw(self, ids: Sequence[int]) -> np.ndarray:
        """Generate one batch: uint8 `[N, H, W, C]`."""
        return self.sampler.images(ids, batch_size=len(ids), on_step=self._on_step)

    def warm_up(self, batch: int) -> None:
        """Compile whatever a batch of this size needs."""
        self.sampler.warm_up(batch)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
