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
from ddpm_engine.samplers.request import DEFAULT_STRENGTH, SampleRequest

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
    the parameterization decides."""
    codec: Codec = PixelCodec()  # noqa: RUF009
    """Maps samples to images."""
    sample_shape: tuple[int, int, int] | None = None
    """`(C, H, W)` of the samples; None: that of the network."""

    def __post_init__(self) -> None:
        if self.sampling.clip_x0 is None:
            clips = clips_x0(self.prediction, None)
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
    def spec(self) -> ConditioningSpec:
        """The conditions that the network was built for; none if it does not say."""
        spec: ConditioningSpec = getattr(self.network, "conditioning", ConditioningSpec())
        return spec

    def request(self, **options: Any) -> SampleRequest:
        """Build a request in which the model's own sampling holds where nothing is given.

        Args:
            options: fields of `SampleRequest` and of `SamplingConfig`. `guidance` may be the scale.

        Raises:
            UserError: values out of range, or options that do nothing with the sampler.
        """
        chosen = {name: options.pop(name) for name in list(options) if name in _SAMPLING}
        if isinstance(options.get("guidance"), int | float):
            options["guidance"] = Guidance(options["guidance"])
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
        request.check_low_resolution(self.spec)
        classes = request.classes_for(self.spec)
        return replace(
            request,
            sampling=sampling,
            classes="none" if classes is None else classes,
            strength=strength,
            precision=choose_precision(request.precision, self.device),
        )
