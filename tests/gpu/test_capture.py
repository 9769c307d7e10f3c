"""Sampling loops as CUDA graphs: what a GPU replays is what it runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.gpu.networks import unet
from tests.kernels.comparing import largest
from tests.sampling import sample
from tests.watching import OnTheHost
from torch import Tensor

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_kernels.dispatch import force_ops

CUDA = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small_unet(device: torch.device, classes: int | None = None) -> UNet:
    """Two levels with attention, on 16×16 pixels, in float32."""
    config = UNetConfig(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        num_class_embeds=classes,
    )
    return unet(config, device)


class Pointwise(torch.nn.Module):
    """Stands in for a network: nothing whose result could depend on how it is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        return self.factor * x + 0.001 * timesteps[:, None, None, None]


def sampled(
    model: Callable[..., Tensor], side: int, seed: int, capture: bool, **options: Any
) -> Tensor:
    """Four samples of a seed in two batches: the second replays what the first captured."""
    ids = torch.tensor([0, 5, 2**40, 1], device=CUDA)
    return sample(
        model, NoiseSchedule.linear(1000), sample_ids=ids, seed=seed, steps=6, batch_size=2,
        shape=(3, side, side), capture=capture, **options,
    )  # fmt: skip


@on_gpu
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "heun"])
def test_a_loop_is_the_same_to_the_bit(sampler: Any) -> None:
    for seed in (3, -7):
        eager, graph = (
            sampled(Pointwise().to(CUDA), 17, seed, capture, sampler=sampler)
            for capture in (False, True)
        )
        assert torch.equal(graph, eager)


@on_gpu
@pytest.mark.parametrize("case", ["plain", "cached features", "guided in an interval"])
def test_a_loop_with_a_network(case: str) -> None:
    """Libraries may choose other algorithms in a graph, and convolve in TF32."""
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "cached features": {"cache_interval": 3},
        "guided in an interval": {
            "labels": torch.tensor([0, 1, 2, 3], device=CUDA),
            "guidance": Guidance(2.0, interval=(2.0, 10.0)),
        },
    }
    options = cases[case]
    model = small_unet(CUDA, classes=5 if "labels" in options else None)
    eager, again, graph = (
        sampled(model, 16, 3, capture, **options) for capture in (False, False, True)
    )
    assert largest(graph - eager) <= 2 * largest(again - eager) + 5e-3


def test_a_step_takes_nothing_from_the_host() -> None:
    """A copy from the host waits and ends a capture; meta tensors stand for those of a GPU."""
    meta = torch.device("meta")
    table = build_table(NoiseSchedule.linear(1000), "dpm++3m", 6)
    steps = StepRunner(
        small_unet(torch.device("cpu"), classes=5).to(meta), table, (3, 3, 16, 16),
        Conditioning(torch.zeros(3, dtype=torch.int64, device=meta)), meta,
        guidance=Guidance(2.0, rescale=0.7), alpha_bar=torch.full((6,), 0.5),
        threshold=0.9, capture=lambda step: step,
    )  # fmt: skip
    with force_ops(), OnTheHost() as host:
        for _ in range(6):
            steps.step()
    assert host.found == []
