"""Time of the noise on a CPU: `python benchmarks/cpu_noise.py`.

Times the noise of the counter map alone, and q_sample with denoising_loss and its gradient, which
generate it twice, once as `philox` specifies it and once in blocks as `ddpm_kernels.cpu_noise`, in
turn, and reports the ratio of each pair's times. The two give the same values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import torch

from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.cli.options import Positive, parse_options
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_kernels import Stream, cpu_noise, denoising_loss, gaussian_noise, q_sample
from ddpm_kernels.philox import random_normals

WAYS = {
    "reference": random_normals,
    "blocks": cpu_noise.random_normals_in_blocks,
}


@dataclass(frozen=True)
class Options:
    """Time of the noise, with the reference and in blocks."""

    batch: Positive = 64
    """Images at a time."""
    size: Positive = 32
    """Pixels a side."""
    pairs: Positive = 51
    """Timings of each way."""


def measure(name: str, work: Callable[[], object], options: Options) -> None:
    """Time both ways in turn and print what was found."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for pair in range(-3, options.pairs):
        for way, draw in WAYS.items():
            with mock.patch.object(cpu_noise, "random_normals_in_blocks", draw):
                start = time.perf_counter()
                work()
                elapsed = time.perf_counter() - start
            if pair >= 0:  # the first few warm up
                seconds[way].append(elapsed)
    ratios = [a / b for a, b in zip(seconds["reference"], seconds["blocks"], strict=True)]
    found = {
        "work": name,
        "batch": options.batch,
        "size": options.size,
        "threads": torch.get_num_threads(),
        **{f"{way}_ms": round(1e3 * median(times), 2) for way, times in seconds.items()},
        "ratio_median": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
    }
    print(json.dumps(found))


@exit_in_one_line()
def main() -> None:
    """Measure the noise, and a step that generates it twice."""
    options = parse_options(Options)
    schedule = NoiseSchedule.linear(1000)
    tables = schedule.sqrt_alpha_bar.float(), schedule.sqrt_one_minus_alpha_bar.float()
    shape = (3, options.size, options.size)
    images = torch.randint(0, 256, (options.batch, *shape), dtype=torch.uint8)
    timesteps = torch.randint(0, 1000, (options.batch,))
    ids, ones = torch.arange(options.batch), torch.ones_like(tables[0])
    prediction = torch.randn(images.shape).to(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        q_sample(images, timesteps, *tables, 0, ids)
        denoising_loss(prediction, images, timesteps, None, ones, 0, ids).mean().backward()

    measure("noise", lambda: gaussian_noise(0, ids, shape, 0, Stream.TRAINING_NOISE), options)
    measure("noising and loss", step, options)


if __name__ == "__main__":
    main()
