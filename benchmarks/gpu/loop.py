"""Whole sampling loops: eager, with every step captured as a CUDA graph, compiled, and both."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from benchmarks.gpu.timing import Extent, Measurement, Timer, interleaved, named
from torch import Tensor, nn

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler

SEED = 3


def unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> UNet:
    """Build a U-Net of random weights, none of them zero."""
    torch.manual_seed(0)
    model = UNet(config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def small_unet(device: torch.device, classes: int | None = None) -> UNet:
    """Build two levels with attention, on 16×16 pixels, in float32."""
    config = UNetConfig(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        num_class_embeds=classes,
    )
    return unet(config, device, torch.float32)


def measure_loop(device: torch.device, extent: Extent, timer: Timer) -> list[Measurement]:
    """Time whole loops: eager, with every step captured, compiled and both.

    In full, the paper's CIFAR-10 network in bfloat16, 64 samples, 25 steps. The time of one call
    is that of a step; it includes making the graphs, once a loop. Bytes are not counted: a network
    is no matter of bandwidth.
    """
    if extent == "full":
        model, batch, steps, repeats = unet(UNetConfig(), device, torch.bfloat16), 64, 25, 5
    else:
        model, batch, steps, repeats = small_unet(device), 2, 4, 3
    bound = DiffusionModel(model, NoiseSchedule.linear(1000), "eps")
    request = bound.request(seed=SEED, steps=steps)

    def loops(kind: str) -> dict[str, Callable[[], object]]:
        def run(capture: bool) -> Tensor:
            sampler = Sampler(bound, request, capture=capture and device.type == "cuda")
            return sampler.sample(range(8 * batch), batch_size=batch)

        return {kind: lambda: run(False), f"{kind}, graph": lambda: run(True)}

    times = interleaved(loops("eager"), timer, repeats)
    if device.type == "cuda":
        model.compile_blocks()
        times |= interleaved(loops("compiled"), timer, repeats)
    name = f"sampling loop, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    dtype = named(next(model.parameters()).dtype)
    calls = 8 * steps
    return [
        Measurement(
            name, (batch, *model.sample_shape), dtype, way, 0,
            median(found) / calls * 1e3, min(found) / calls * 1e3, median(found) / calls * 1e3,
            calls, repeats,
        )
        for way, found in times.items()
    ]  # fmt: skip
