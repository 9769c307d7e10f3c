"""A training and sampling engine for image diffusion models.

    model = ddpm_engine.load("runs/digits")  # or "google/ddpm-cifar10-32"
    model.sample(64, seed=3, steps=20).images

The names below are imported when they are first used; everything else is in its module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_engine.checkpoints.load import LoadedModel, load
    from ddpm_engine.config import RunConfig
    from ddpm_engine.diffusion.guidance import Guidance
    from ddpm_engine.diffusion.schedule import NoiseSchedule
    from ddpm_engine.errors import UserError
    from ddpm_engine.generation.chain import Cascade
    from ddpm_engine.networks.base import Network
    from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
    from ddpm_engine.networks.unet.config import UNetConfig
    from ddpm_engine.networks.unet.unet import UNet
    from ddpm_engine.samplers.model import DiffusionModel
    from ddpm_engine.samplers.request import SampleRequest
    from ddpm_engine.samplers.sampler import Sampler
    from ddpm_engine.samplers.samples import Samples, sample
    from ddpm_engine.training.trainer import Trainer

_MODULES = {
    "Cascade": "generation.chain",
    "Conditioning": "networks.conditioning",
    "ConditioningSpec": "networks.conditioning",
    "DiffusionModel": "samplers.model",
    "Guidance": "diffusion.guidance",
    "LoadedModel": "checkpoints.load",
    "Network": "networks.base",
    "NoiseSchedule": "diffusion.schedule",
    "RunConfig": "config",
    "SampleRequest": "samplers.request",
    "Sampler": "samplers.sampler",
    "Samples": "samplers.samples",
    "Trainer": "training.trainer",
    "UNet": "networks.unet.unet",
    "UNetConfig": "networks.unet.config",
    "UserError": "errors",
    "load": "checkpoints.load",
    "sample": "samplers.samples",
}

__all__ = [
    "Cascade",
    "Conditioning",
    "ConditioningSpec",
    "DiffusionModel",
    "Guidance",
    "LoadedModel",
    "Network",
    "NoiseSchedule",
    "RunConfig",
    "SampleRequest",
    "Sampler",
    "Samples",
    "Trainer",
    "UNet",
    "UNetConfig",
    "UserError",
    "load",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
