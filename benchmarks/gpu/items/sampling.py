"""What a sampling step costs: eager, captured, with weights in half precision, compiled, guided."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from benchmarks.gpu.item import Context
from benchmarks.gpu.networks import config_of, unet

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler

SEED = 3
WAYS: Mapping[str, Mapping[str, bool]] = {
    "eager": {},
    "graph": {"capture": True},
    "graph, half weights": {"capture": True, "half": True},
    "compiled graph, half weights": {"capture": True, "half": True, "compiled": True},
}


def steps_of(
    context: Context, preset: str, batch: int, ways: tuple[str, ...], guided: bool = False
) -> None:
    """Sample batches, the first of which compiles and captures; time the others.

    Args:
        context: of the item.
        preset: whose network.
        batch: samples at a time.
        ways: of `WAYS`.
        guided: by classes; a step evaluates twice as many samples.
    """
    dry, device = context.dry, context.device
    config = config_of(preset, dry).model
    if guided:
        config = replace(config, num_class_embeds=11)
    batch, count = (2, 2) if dry else (batch, 50 if config.sample_size < 64 else 10)
    network = unet(config, device)
    for way in ways:
        took = _step(network, batch, count, guided, device, **WAYS[way])
        context.add({
            "way": way + (", guided" if guided else ""),
            "network": f"{preset}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M",
            "batch": batch, "ms a step": took, "steps/s of a sample": batch / took * 1e3,
            f"images/s in {count} steps": batch / took * 1e3 / count,
        })  # fmt: skip


def _step(
    network: Any, batch: int, count: int, guided: bool, device: torch.device,
    capture: bool = False, half: bool = False, compiled: bool = False,
) -> float:  # fmt: skip
    """Milliseconds of a step, the least of two batches."""
    network = copy.deepcopy(network)
    if compiled and device.type == "cuda":
        network.compile_blocks()
    bound = DiffusionModel(network, NoiseSchedule.linear(1000), "eps")
    on_gpu = device.type == "cuda"  # a CPU refuses slow bf16
    # Without half-precision weights, autocast around the sampler converts them at each step.
    options: dict[str, Any] = {"precision": "bf16" if half and on_gpu else "no"}
    if guided:
        options["guidance"] = 2.0
    request = bound.request(seed=SEED, steps=count, **options)
    sampler = Sampler(bound, request, capture=capture and on_gpu)
    times = []
    for turn in range(3):
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu and not half):
            samples = sampler.sample(range(turn * batch, (turn + 1) * batch), batch_size=batch)
        assert bool(samples.isfinite().all())  # waits for them
        times.append((time.perf_counter() - begun) / count * 1e3)
    return min(times[1:])
