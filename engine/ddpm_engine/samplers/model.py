"""A network together with what samplers need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.parameterization import clips_x0
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.images.data_codec import Codec, PixelCodec
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.runtime import choose_precision
from ddpm_engine.samplers.config import SamplingConfig, refuse_unused
from ddpm_engine.samplers.prompts import PromptEncoder
from ddpm_engine.samplers.request import DEFAULT_STRENGTH, SampleRequest, VectorSource

_SAMPLING = {field.name for field in fields(SamplingConfig)}


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A trained network, the process it was trained on, and how it is sampled by default."""

    network: Any
    """`network(x, noise_level, conditioning)`, in eval mode; see `networks.base.Network`."""
    schedule: NoiseSchedule
    """Noise schedule that the network was trained on."""
    prediction: str
    """What the network predicts, a key of `PARAMETERIZATIONS`."""
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009
    """Sampler, steps, variance and clipping where a request names none. If it leaves clipping open,
    the codec and the parameterization decide."""
    codec: Codec = PixelCodec()  # noqa: RUF009
    """Maps samples to images."""
    sample_shape: tuple[int, int, int] | None = None
    """`(C, H, W)` of the samples; None: that of the network."""
    text_encoder: PromptEncoder | None = None
    """Encoder of prompts, for a network conditioned on text; None: it takes embeddings only."""
    null_prompt: str | None = None
    """Text whose embeddings stand for no text, as Stable Diffusion has the empty one; None: zeros
    do, as in this engine's own training."""
    vector: VectorSource = "text"
    """What the network's vector is, if it is conditioned on one."""

    def __post_init__(self) -> None:
        if self.sampling.clip_x0 is None:
            bounded = self.codec.clip_range is not None
            clips = bounded and clips_x0(self.prediction, None)
            object.__setattr__(self, "sampling", replace(self.sampling, clip_x0=clips))

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters; the CPU if it has none."""
        if isinstance(self.network, torch.nn.Module):
            for parameter in self.network.parameters():
                return parameter.device
        return torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the samples."""
        channels, height, width = self.sample_shape or self.network.sample_shape
        return channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images that samples decode to."""
        return self.codec.image_shape(self.shape)

    @property
    def spec(self) -> ConditioningSpec:
        """The conditions that the network was built for; none if it does not say."""
        spec: ConditioningSpec = getattr(self.network, "conditioning", ConditioningSpec())
        return spec

    @property
    def takes_text(self) -> bool:
        """Whether prompts condition the network: their tokens, their pooled embedding, or both."""
        spec = self.spec
        return spec.text is not None or (spec.vector is not None and self.vector == "text")

    def request(self, **options: Any) -> SampleRequest:
        """Build a request in which the model's own sampling holds where nothing is given.

        Args:
            options: fields of `SampleRequest` and of `SamplingConfig`. `guidance` may be the scale,
                and `prompts` a list, or a single one.

        Raises:
            UserError: values out of range, or options that do nothing with the sampler.
        """
        chosen = {name: options.pop(name) for name in list(options) if name in _SAMPLING}
        if isinstance(options.get("guidance"), int | float):
            options["guidance"] = Guidance(options["guidance"])
        if isinstance(prompts := options.get("prompts"), str | list):
            options["prompts"] = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if chosen:
            # Listed timesteps replace the number of steps.
            known = (
                replace(self.sampling, steps=None) if options.get("timesteps") else self.sampling
            )
            options["sampling"] = sampling = replace(options.get("sampling") or known, **chosen)
            refuse_unused(chosen, sampling.sampler)
            if options.get("timesteps") and chosen.get("spacing") is not None:
                raise UserError(
                    "`timesteps` and `spacing` do not go together; leave one out", "timesteps"
                )
        return SampleRequest(**options)

    def resolve(self, request: SampleRequest) -> SampleRequest:
        """Fill in whatever a request leaves to the model.

        Raises:
            UserError: a request that the model cannot serve.
        """
        sampling = request.sampling
        if sampling is None:
            listed = request.timesteps is not None
            sampling = replace(self.sampling, steps=None) if listed else self.sampling
        if sampling.clip_x0 is None:
            sampling = replace(sampling, clip_x0=self.sampling.clip_x0)
        if sampling.steps is None and request.timesteps is None:
            sampling = replace(sampling, steps=self.schedule.timesteps)
        strength = request.strength
        if request.images is not None and request.mask is None and strength is None:
            strength = DEFAULT_STRENGTH
        if request.threshold is not None and self.codec.clip_range is None:
            raise UserError(
                f"`threshold` is {request.threshold:g}, but this network's samples are latents, "
                "which dynamic thresholding has no bounds for; leave it out",
                "threshold",
            )
        request.check_low_resolution(self.spec)
        request.check_text(self.spec, self.vector, self.text_encoder is not None)
        classes = request.classes_for(self.spec)
        return replace(
            request,
            sampling=sampling,
            classes="none" if classes is None else classes,
            strength=strength,
            precision=choose_precision(request.precision, self.device),
        )
