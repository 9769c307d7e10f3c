"""Whole sampling loops: every step captured as a CUDA graph and replayed, beside eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from benchmarks.gpu.checks import Check, Extent, named
from benchmarks.gpu.compare import Comparison, equal, largest
from benchmarks.gpu.timing import Measurement, Timer, interleaved
from torch import Tensor, nn

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.sampler import sample

Model = Callable[..., Tensor]
SEED = 3


def unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> UNet:
    """A U-Net of random weights, none of them zero."""
    torch.manual_seed(0)
    model = UNet(config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


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
    return unet(config, device, torch.float32)


def pointwise(x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
    """Stands in for a network: nothing whose result could depend on how it is launched."""
    return 0.5 * x + 0.001 * timesteps[:, None, None, None]


def pictures(
    model: Model, side: int, seed: int, device: torch.device, capture: bool, **options: Any
) -> Tensor:
    """Four pictures of a seed in two batches: the second replays what the first captured."""
    ids = torch.tensor([0, 5, 2**40, 1], device=device)
    return sample(
        model, NoiseSchedule.linear(1000), sample_ids=ids, seed=seed, steps=6, batch_size=2,
        shape=(3, side, side), capture=capture and device.type == "cuda", **options,
    )  # fmt: skip


def check_loop(
    model: Model, side: int, exact: bool, device: torch.device, **options: Any
) -> list[Comparison]:
    """Captured beside eager, for two seeds.

    To the bit where nothing depends on how it is launched; with a network, within twice what two
    eager runs differ by, and 5e-3: libraries may choose other algorithms in a graph, and convolve
    in TF32.
    """
    found = []
    for seed in (SEED, -7):
        eager, again, graph = (
            pictures(model, side, seed, device, capture, **options)
            for capture in (False, False, True)
        )
        if exact:
            found.append(equal(f"seed {seed}", graph, eager))
        else:
            allowed = 2 * largest(again - eager) + 5e-3
            found.append(Comparison(f"seed {seed}", largest(graph - eager), allowed))
    return found


def loop_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Chains that must agree to the bit, and some with a U-Net."""
    for sampler in ("ddpm", "dpm++2m", "heun"):
        check = partial(check_loop, pointwise, 17, True, device, sampler=sampler)
        yield f"pointwise network, {sampler}", check
    yield "U-Net", lambda: check_loop(small_unet(device), 16, False, device)
    yield (
        "U-Net, cached features",
        lambda: check_loop(small_unet(device), 16, False, device, cache_interval=3),
    )
    yield (
        "U-Net, guided in an interval",
        lambda: check_loop(
            small_unet(device, classes=5), 16, False, device,
            labels=torch.tensor([0, 1, 2, 3], device=device),
            guidance=Guidance(2.0, interval=(2.0, 10.0)),
        ),
    )  # fmt: skip


def measure_loop(device: torch.device, extent: Extent, timer: Timer) -> list[Measurement]:
    """Time whole loops: eager, with every step captured, compiled and both.

    In full, the paper's CIFAR-10 network in bfloat16, 64 pictures, 25 steps. The time of one call
    is that of a step; it includes making the graphs, once a loop. Bytes are not counted: a network
    is no matter of bandwidth.
    """
    if extent == "full":
        model, batch, steps, repeats = unet(UNetConfig(), device, torch.bfloat16), 64, 25, 5
    else:
        model, batch, steps, repeats = small_unet(device), 2, 4, 3
    ids = torch.arange(8 * batch, device=device)
    schedule = NoiseSchedule.linear(1000)

    def loops(kind: str) -> dict[str, Callable[[], object]]:
        def run(capture: bool) -> Tensor:
            return sample(
                model, schedule, sample_ids=ids, seed=SEED, steps=steps, batch_size=batch,
                capture=capture and device.type == "cuda",
            )  # fmt: skip

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
