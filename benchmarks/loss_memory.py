"""Memory of noising and loss: `python benchmarks/loss_memory.py`.

Measures, for each way of computing x_t and the loss of the same batch, how far the process's
resident memory rises above what it held before, each in a separate process, around:

    engine     ddpm_kernels.q_sample and denoising_loss, which generate noise twice and keep none
    textbook   images to float, torch.randn, mix, mean squared error; the noise is kept for the loss

Both run forward and backward, with a prediction that costs nothing. On a CPU the engine runs plain
torch operations, and generates the noise in blocks; the fused kernels are for GPUs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.cli.options import Positive, parse_options
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_kernels import denoising_loss, q_sample

WAYS = ("engine", "textbook")


@dataclass(frozen=True)
class Options:
    """Peak memory of noising and loss."""

    batch: Positive = 64
    """Images at a time."""
    size: Positive = 128
    """Pixels a side."""
    repeats: Positive = 3
    """Processes of each kind; the median is reported."""
    only: Literal["engine", "textbook"] | None = None
    """Measure one way in this process and print its bytes; default: both."""


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def engine(images: torch.Tensor, timesteps: torch.Tensor, schedule: NoiseSchedule) -> None:
    """One step's noising, loss and gradient by the engine's operations."""
    tables = schedule.sqrt_alpha_bar.float(), schedule.sqrt_one_minus_alpha_bar.float()
    ids = torch.arange(len(images))
    prediction = q_sample(images, timesteps, *tables, 0, ids).requires_grad_()
    ones = torch.ones_like(tables[0])
    denoising_loss(prediction, images, timesteps, None, ones, 0, ids).mean().backward()


def textbook(images: torch.Tensor, timesteps: torch.Tensor, schedule: NoiseSchedule) -> None:
    """The same as most codebases write it."""
    signal = schedule.sqrt_alpha_bar.float()[timesteps][:, None, None, None]
    sigma = schedule.sqrt_one_minus_alpha_bar.float()[timesteps][:, None, None, None]
    x_0 = images.float() / 127.5 - 1
    noise = torch.randn_like(x_0)
    prediction = (signal * x_0 + sigma * noise).requires_grad_()
    torch.nn.functional.mse_loss(prediction, noise).backward()


def measure(options: Options) -> int:
    """Bytes that one step adds to the peak, after a tiny one has loaded every library."""
    schedule = NoiseSchedule.linear(1000)
    way = engine if options.only == "engine" else textbook
    way(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 999]), schedule)
    shape = (options.batch, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    timesteps = torch.randint(0, 1000, (options.batch,))
    before = peak_bytes()
    way(images, timesteps, schedule)
    return peak_bytes() - before


@exit_in_one_line()
def main() -> None:
    """Measure both ways in turn, or one of them here."""
    options = parse_options(Options)
    if options.only is not None:
        print(measure(options))
        return
    found: dict[str, list[int]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--only", way]
            command += ["--batch", str(options.batch), "--size", str(options.size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(int(output))
    values = options.batch * 3 * options.size**2
    for way, measured in found.items():
        print(
            json.dumps(
                {
                    "way": way,
                    "batch": options.batch,
                    "size": options.size,
                    "peak_mib": round(median(measured) / 2**20, 1),
                    "bytes_a_value": round(median(measured) / values, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
