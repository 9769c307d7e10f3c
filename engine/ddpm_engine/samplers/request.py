"""A request for samples: everything besides the model and the ids that determines them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor

from ddpm_engine.bounds import Ge, Gt, Le, out_of_bounds
from ddpm_engine.diffusion.config import MAX_LEVEL
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.runtime import Precision
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.identity import Seed, check_id, whole
from ddpm_engine.samplers.prompts import check_prompts
from ddpm_engine.sizes import as_text

DEFAULT_STRENGTH = 0.5
"""Fraction of the steps taken from a given image, unless a mask says what to keep of it."""


VectorSource = Literal["text", "image"]
"""What a network's vector is: the pooled embedding of the prompt, or an image embedding."""


class ImageSource(Protocol):
    """Images, or image embeddings, by sample id."""

    classes: tuple[int, ...] | None
    """Class of the images of ids 0, 1, 2, …, from the first again after the last; None: unknown."""

    @property
    def sha256(self) -> str:
        """Hash of whatever determines the images."""
        ...

    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the images of these samples: float32 `[N, C, H, W]` in [-1, 1].

        Embeddings are `[N, D]`, or `[N, D, 1, 1]` as a prior gives them.
        """
        ...


class Rows:
    """Images in memory: sample k goes with row k, and again from the first after the last.

    Args:
        images: float `[N, C, H, W]` in [-1, 1], N > 0; or embeddings, `[N, D]`.

    Raises:
        UserError: no images.
    """

    classes: tuple[int, ...] | None = None
    """See `ImageSource`."""

    def __init__(self, images: Tensor) -> None:
        if not len(images):
            raise UserError(f"there are no images in a tensor of shape {tuple(images.shape)}")
        self.images = images

    @property
    def sha256(self) -> str:
        """See `ImageSource`."""
        return sha256_of(self.images)

    def of(self, ids: Sequence[int]) -> Tensor:
        """See `ImageSource`."""
        return self.images[rows_of(ids, len(self.images)).to(self.images.device)]


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """Everything besides the model and the ids that determines samples.

    Whatever belongs to one sample is a function of its id: entry k of a list goes with sample k,
    and the list begins again after its end. So a sample is the same in every batch.

    Raises:
        UserError: values out of range, or options that need another.
    """

    seed: Seed = 0
    """Seed of all noise, 64 bits: another seed gives other samples."""
    sampling: SamplingConfig | None = None
    """Sampler, its steps, variance and clipping; None: the model's."""
    timesteps: tuple[int, ...] | None = None
    """Timesteps to visit, decreasing, such as 999,750,500,250,0; default: those of the spacing."""
    classes: tuple[int, ...] | Literal["all", "none"] | None = None
    """Class of sample 0, 1, 2, ..., and again from the first; all: every class in turn; none: the
    null class. None: those of the low-resolution samples, if there are such; none for samples made
    from images or interpolated; otherwise all that the network has."""
    prompts: tuple[str, ...] | None = None
    """Prompts of samples 0, 1, 2, ..., and again from the first after the last; default: none, for
    which a network that is conditioned on text gets the null text."""
    negative_prompt: str | None = None
    """Text that guidance leads away from; default: the null text."""
    embeddings: ImageSource | Tensor | None = None
    """Image embeddings that samples are conditioned on, `[N, D]`, one for each of samples 0, 1,
    2, ..., and again from the first after the last."""
    conditions: Conditioning | None = None
    """Conditions of other kinds, one row for each of samples 0, 1, 2, ..., and again from the first
    after the last."""
    guidance: Guidance | None = None
    """Classifier-free guidance; None: none."""
    threshold: Annotated[float, Gt(0), Le(1)] | None = None
    """Quantile of an estimate's absolute values that bounds it (dynamic thresholding), above 0 and
    at most 1, such as 0.995; default: bounds of -1 and 1."""
    images: ImageSource | Tensor | None = None
    """Images to begin with, or with a mask to keep parts of: `[N, C, H, W]` in [-1, 1]."""
    strength: Annotated[float, Gt(0), Le(1)] | None = None
    """Fraction of the steps taken from the noised image, above 0 and at most 1; default: 0.5, and
    noise alone with a mask."""
    mask: Tensor | None = None
    """bool `[1 or N, 1 or C, H, W]`, True where the images are kept (inpainting)."""
    repeats: Annotated[int, Ge(1)] = 1
    """Number of times that inpainting takes each step, so that both parts fit together."""
    low_resolution: ImageSource | Tensor | None = None
    """Low-resolution images for super-resolution, `[N, C, side, side]` in [-1, 1]."""
    augmentation_level: Annotated[int, Ge(0), Le(MAX_LEVEL)] = 0
    """Level of the noise added to low-resolution images, 0 (none) to 1000."""
    interpolate: tuple[int, int, int] | None = None
    """First id, second id and count: samples 0 ... count - 1 lead from the one to the other."""
    cache_interval: Annotated[int, Ge(1)] = 1
    """Number of steps for which the network's deep features are reused; 1: none."""
    precision: Precision = "auto"
    """Precision of the network's arithmetic; no: float32; auto: bf16 on GPUs that are made for it,
    no elsewhere."""

    def __post_init__(self) -> None:
        for name in ("seed", "repeats", "augmentation_level", "cache_interval"):
            whole(getattr(self, name), name)
        for end in self.interpolate or ():
            check_id(end, "interpolate")
        for section in (self, self.sampling):
            for problem in () if section is None else out_of_bounds(section):
                raise problem
        if self.prompts is not None:
            check_prompts(self.prompts)
        if self.negative_prompt is not None:
            check_prompts((self.negative_prompt,), "negative_prompt")
        for name, needed in _NEEDS:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and getattr(self, needed) is None:
                raise UserError(f"`{name}` needs `{needed}`; give that too, or leave `{name}` out")

    def classes_for(self, spec: ConditioningSpec) -> tuple[int, ...] | None:
        """Return the classes that samples of a network get in turn; None: the null class.

        Raises:
            UserError: classes that the network does not have.
        """
        null, classes = spec.null_class, self.classes
        if classes is None:
            if self.low_resolution is not None and null is not None:
                return as_source(self.low_resolution).classes
            from_noise = self.images is None and self.interpolate is None
            classes = "all" if null and from_noise and self.conditions is None else "none"
        if classes == "none":
            return None
        if not null:
            raise UserError(
                f"`classes` is {classes if classes == 'all' else classes[0]}, but this network was "
                "trained without classes; leave it out"
            )
        if classes == "all":
            return tuple(range(null))
        if not classes:
            raise UserError("`classes` is empty; name at least one, or leave it out", "classes")
        if wrong := [label for label in classes if not 0 <= whole(label, "classes") <= null]:
            raise UserError(f"`classes` has {wrong[0]}; classes are 0 to {null - 1}")
        return classes

    def check_low_resolution(self, spec: ConditioningSpec) -> None:
        """Refuse low-resolution images that the network lacks or has no use for.

        Raises:
            UserError: either.
        """
        size = spec.low_resolution
        if size is not None and self.low_resolution is None:
            raise UserError(
                f"this network upscales images of {as_text(size)}; give some by `low_resolution`, "
                "such as samples of another model"
            )
        if size is None and self.low_resolution is not None:
            raise UserError(
                "`low_resolution` is given, but this is no super-resolution network; leave it out"
            )

    def check_text(self, spec: ConditioningSpec, vector: VectorSource, encoder: bool) -> None:
        """Refuse prompts and image embeddings that the network has no use for.

        Args:
            spec: of the network.
            vector: where the network's vector comes from.
            encoder: whether there is a text encoder.

        Raises:
            UserError: either, or prompts without an encoder.
        """
        if self.embeddings is not None and (spec.vector is None or vector != "image"):
            raise UserError(
                "`embeddings` is given, but this network is not conditioned on image embeddings; "
                "leave it out"
            )
        if self.prompts is None:
            return
        if spec.text is None and (spec.vector is None or vector != "text"):
            why = "is not conditioned on text; leave it out"
            if spec.vector is not None:
                why = "is conditioned on image embeddings, which a prior makes of prompts"
            raise UserError(f"`prompts` is given, but this network {why}")
        if not encoder:
            raise UserError(
                "`prompts` needs the text encoder that this network was trained with, and none is "
                "known; name it by `text_encoder`",
                "prompts",
            )

    def settings(self) -> dict[str, Any]:
        """Return what a manifest says of the request, as JSON values.

        It leaves out what changes samples by no more than the rounding of the network's arithmetic.
        """
        guidance = self.guidance
        low, high = (None, None) if guidance is None else guidance.interval
        low_resolution = self.low_resolution
        settings = {
            "seed": self.seed,
            **({} if self.sampling is None else self.sampling.table_options()),
            "timesteps": self.timesteps,
            "classes": self.classes,
            "guidance_scale": None if guidance is None else guidance.scale,
            "guidance_rescale": None if guidance is None else guidance.rescale,
            "guidance_interval": [low, None if high == float("inf") else high],
            "threshold": self.threshold,
            "images": None if self.images is None else as_source(self.images).sha256,
            "strength": self.strength,
            "mask": None if self.mask is None else sha256_of(self.mask),
            "draws": self.repeats,
            "low_resolution": None if low_resolution is None else as_source(low_resolution).sha256,
            "augmentation": None if low_resolution is None else self.augmentation_level,
            "interpolate": self.interpolate,
            "cache_interval": self.cache_interval,
            "precision": self.precision,
        }
        # Entries that most samples lack are left out where they do.
        if self.prompts is not None:
            settings["prompts"] = list(self.prompts)
            settings["negative_prompt"] = self.negative_prompt
        if self.embeddings is not None:
            settings["embeddings"] = as_source(self.embeddings).sha256
        if self.conditions is not None:
            rows = self.conditions.present()
            settings["conditions"] = {name: sha256_of(tensor) for name, tensor in rows.items()}
        return settings


_NEEDS = (
    ("strength", "images"),
    ("mask", "images"),
    ("repeats", "mask"),
    ("augmentation_level", "low_resolution"),
    ("negative_prompt", "prompts"),
    ("negative_prompt", "guidance"),
)
"""Fields that mean nothing without another."""


def as_source(images: ImageSource | Tensor) -> ImageSource:
    """Return images by sample id; of a tensor, `images` is `[N, C, H, W]`, used in turn."""
    return Rows(images) if isinstance(images, Tensor) else images


def rows_of(ids: Sequence[int], count: int) -> Tensor:
    """Return the row of a list of `count` that goes with each sample: int64 `[N]`."""
    return torch.tensor([k % count for k in ids], dtype=torch.int64)


def sha256_of(tensor: Tensor) -> str:
    """Hash the values of a `tensor` of any shape."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
