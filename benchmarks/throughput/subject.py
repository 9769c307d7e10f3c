"""What is measured: one set of weights, in the engine's network and in diffusers'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.presets import PRESETS
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_kernels import Stream, gaussian_noise

SEED = 0


@dataclass(frozen=True)
class Subject:
    """Weights, and the configuration of their run."""

    name: str
    config: RunConfig
    weights: dict[str, Tensor]
    device: torch.device

    @property
    def schedule(self) -> NoiseSchedule:
        """What the network was trained on."""
        return self.config.diffusion.build_schedule()

    @cached_property
    def unet(self) -> UNet:
        """The engine's network, eager."""
        return self.copy()

    @cached_property
    def compiled(self) -> UNet:
        """The engine's network, compiled block by block at the first call."""
        model = self.copy()
        model.compile_blocks()
        return model

    @property
    def fastest(self) -> UNet:
        """Compiled on a GPU, eager on a CPU, where torch normalises faster than compiled code."""
        return self.unet if self.device.type == "cpu" else self.compiled

    @cached_property
    def twin(self) -> nn.Module:
        """Diffusers' network.

        Raises:
            ImportError: it is not installed.
        """
        from diffusers import UNet2DModel

        known = signature(UNet2DModel).parameters
        fields = {k: v for k, v in asdict(self.config.model).items() if k in known}
        model: nn.Module = UNet2DModel(**fields)
        model.load_state_dict(self.weights)
        return model.to(self.device).eval().requires_grad_(False)

    def copy(self) -> UNet:
        """The engine's network with these weights, in eval mode."""
        model = UNet(self.config.model)
        model.load_state_dict(self.weights)
        return model.to(self.device).eval().requires_grad_(False)

    def model(self, network: Any) -> DiffusionModel:
        """Bind a network to the run's process."""
        return DiffusionModel(
            network, self.schedule, self.config.diffusion.prediction, self.config.sampling,
            sample_shape=self.unet.sample_shape,
        )  # fmt: skip


def random_unet(config: RunConfig, seed: int = SEED) -> UNet:
    """A U-Net whose random weights all matter, those that start at zero or one included."""
    generator = torch.Generator().manual_seed(seed)
    model = UNet(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))
    return model


def preset_subject(preset: str, device: torch.device) -> Subject:
    """A preset's network with random weights."""
    config = PRESETS[preset]()
    return Subject(f"{preset}, random weights", config, random_unet(config).state_dict(), device)


def subject_of(model: LoadedModel) -> Subject:
    """The network of a run."""
    where = "" if model.checkpoint is None else str(model.checkpoint.path.parent.parent)
    step = "" if model.step is None else f", step {model.step}"
    return Subject(f"{where}{step}", model.config, model.network.state_dict(), model.device)


@contextmanager
def counted_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Let `torch.randn` return the engine's noise for the samples 0, 1, … of a seed.

    The first call is the initial state, call i + 1 the noise of step i. Textbook loops and
    diffusers' pipelines draw in that order; the engine does not use `torch.randn`.
    """
    calls = 0

    def randn(shape: Any, **_: Any) -> Tensor:
        nonlocal calls
        step, stream = (calls - 1, Stream.SAMPLER_NOISE) if calls else (0, Stream.INITIAL_NOISE)
        calls += 1
        batch, *image = shape
        ids = torch.arange(batch, device=device)
        return gaussian_noise(seed, ids, (image[0], image[1], image[2]), step, stream)

    with mock.patch.object(torch, "randn", randn):
        yield
