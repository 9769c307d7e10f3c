"""The loss of a batch on a GPU asks nothing of the host: no read, no copy to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.watching import OnTheHost, Uploads
from torch import Tensor, nn

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.registry import NetworkConfig
from ddpm_engine.objectives.base import Objective
from ddpm_engine.objectives.config import DistillationConfig, ObjectiveConfig
from ddpm_engine.objectives.distillation.teacher import Teacher
from ddpm_engine.presets import PRESETS, digits, digits_classes
from ddpm_engine.sizes import height_and_width
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.precompile import blank_batch
from ddpm_kernels.dispatch import force_ops

LEARNED = replace(
    digits(),
    model=replace(digits().model, out_channels=2),
    objective=ObjectiveConfig(learned_variance=True, weighting="min-snr"),
)
CONFIGS: dict[str, RunConfig] = {
    **{name: preset() for name, preset in PRESETS.items()},
    "offset noise": replace(digits(), objective=ObjectiveConfig(offset_noise=0.1)),
    "logit-normal": replace(digits(), objective=ObjectiveConfig(timestep_sampling="logit-normal")),
    "learned variance": LEARNED,
    "velocity of x0": replace(
        digits(),
        diffusion=DiffusionConfig(schedule="flow", prediction="x0"),
        objective=ObjectiveConfig(loss="flow", loss_limit=400.0),
    ),
    "x0 of velocity": replace(
        digits(),
        diffusion=DiffusionConfig(schedule="flow", prediction="flow"),
        objective=ObjectiveConfig(loss="x0", loss_limit=10.0, offset_noise=0.1),
    ),
}


class Pointwise(nn.Module):
    """Stands for the network of a preset: the same inputs, outputs and conditions, one layer."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.sample_shape = (config.in_channels, *height_and_width(config.sample_size))
        classes = config.num_class_embeds
        low_resolution = getattr(config, "low_resolution", None)  # not of every family
        self.conditioning = ConditioningSpec(
            None if classes is None else classes - 1,
            low_resolution,
            config.text_channels,
            config.vector_channels,
        )
        self.weight = nn.Parameter(torch.empty(config.out_channels, config.in_channels, 1, 1))

    def forward(self, z: Tensor, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        spec, names = self.conditioning, ("labels", "low_resolution", "text", "vector")
        values = (spec.classes, spec.low_resolution, spec.text, spec.vector)
        given = dict(zip(names, values, strict=True))
        found = {name: getattr(conditioning, name) for name in names}
        assert [n for n, x in given.items() if x] == [n for n, x in found.items() if x is not None]
        return torch.conv2d(z.to(self.weight.dtype), self.weight) + noise_level[:, None, None, None]


def network_of(config: RunConfig) -> Any:
    with torch.device("meta"):
        return Pointwise(config.model)


def objective_of(config: RunConfig, network: Any, teacher: Teacher | None = None) -> Objective:
    schedule = config.diffusion.build_schedule()
    return build_objective(config, schedule, "meta", network.conditioning, teacher)


def batch_for(network: Any, config: RunConfig) -> Batch:
    return blank_batch(network, config, 2, text_length=8).to("meta")


@contextmanager
def nothing_of_the_host() -> Iterator[None]:
    with force_ops(), OnTheHost() as host, Uploads() as uploads:
        yield
    assert host.found + uploads.found == []


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_and_its_gradient(name: str, precision: Any) -> None:
    config = CONFIGS[name]
    config = replace(config, training=replace(config.training, precision=precision))
    network = network_of(config)
    ours, batch = objective_of(config, network), batch_for(network, config)
    with nothing_of_the_host():
        loss = ours(network, batch)
        loss.mean().backward()
    assert (loss.shape, loss.dtype) == ((2,), torch.float32)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("method", ["progressive", "consistency", "moments"])
def test_a_loss_of_distillation_and_its_gradient(method: Any) -> None:
    base = digits_classes()
    plan = DistillationConfig(Path("t"), method, 4, 4 if method == "moments" else 8, 2.0)
    config = replace(base, distillation=plan)
    network, teacher = network_of(base), network_of(base).eval().requires_grad_(False)
    critic = deepcopy(teacher).requires_grad_(True) if method == "moments" else None
    ours = objective_of(config, network, Teacher(teacher, "eps", critic=critic))
    batch = batch_for(network, config)
    with nothing_of_the_host():
        ours(network, batch).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["digits", "offset noise"])
def test_the_network_is_given_its_own_precision(name: str) -> None:
    """As autocast would round it, from float32; in training on a CPU, too."""
    config = CONFIGS[name]
    images = torch.arange(512).remainder(256).to(torch.uint8).view(2, 1, 16, 16)
    batch = Batch(images, None, torch.arange(2) + 7)
    seen: list[Tensor] = []

    def network(z: Tensor, *_: object) -> Tensor:
        seen.append(z)
        return z

    precisions: tuple[Literal["no", "bf16"], ...] = ("no", "bf16")
    for precision in precisions:
        chosen = replace(config, training=replace(config.training, precision=precision))
        build_objective(chosen, config.diffusion.build_schedule())(network, batch)
    exact, rounded = seen
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16))
